"""A Mesh over the process group that `run_ranks` has made."""

import torch
import torch.distributed as dist

from ptm.mesh.mesh import Mesh, make_mesh


def mesh_of_test(rank: int, world: int, ep: int = 1) -> Mesh:
    background = dist.new_group(backend="gloo")
    assert isinstance(background, dist.ProcessGroup)
    mesh = make_mesh(torch.device("cpu"), background, ep)
    assert (mesh.rank, mesh.world) == (rank, world)
    return mesh
