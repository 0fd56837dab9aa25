"""A Mesh over the process group that `run_ranks` has made."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ptm.mesh.collectives import Ledger
from ptm.mesh.mesh import Mesh


def mesh_of_test(rank: int, world: int) -> Mesh:
    dp = DeviceMesh("cpu", torch.arange(world), mesh_dim_names=("dp",))
    background = dist.new_group(backend="gloo")
    assert isinstance(background, dist.ProcessGroup)
    return Mesh(rank, world, torch.device("cpu"), dp, background, Ledger())
