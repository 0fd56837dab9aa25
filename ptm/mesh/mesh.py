"""Which ranks there are, how they talk, and the device each one computes on.

`open_mesh()` is called once per process. A world of one is not a special case: it gets a process
group of its own and its collectives are the identity. The only axis today is dp; ep and edp come
with the engine that shards experts.

Backends: gloo for tensors in CPU memory, NCCL for tensors on a GPU. A second, gloo-only group is
made for background work (saving), because collectives of two threads must never meet in one group.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ptm.common import env
from ptm.mesh.collectives import Ledger, all_reduce_sum


@dataclass(frozen=True)
class Mesh:
    """The ranks of this run. Made by `open_mesh`, closed by `close`."""

    rank: int
    world: int
    device: torch.device
    dp: DeviceMesh
    background: dist.ProcessGroup
    ledger: Ledger

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Sum of a small tensor of counters over the ranks; the argument is left alone."""
        return all_reduce_sum(counts.clone(), self.dp.get_group(), self.ledger)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def open_mesh(timeout_s: int) -> Mesh:
    """Join the other ranks (torchrun's or Slurm's variables), or stand alone.

    Raises: torch's DistBackendError / DistNetworkError if the peers cannot be reached within
    timeout_s.
    """
    me = env.ranks()
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", me.local_rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    store = dist.HashStore() if me.world == 1 else None  # type: ignore
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        rank=me.rank,
        world_size=me.world,
        store=store,
        timeout=timeout,
    )
    dp = DeviceMesh(device.type, torch.arange(me.world), mesh_dim_names=("dp",))
    background = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(background, dist.ProcessGroup)
    return Mesh(me.rank, me.world, device, dp, background, Ledger())
