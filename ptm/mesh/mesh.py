"""Which ranks there are, how they talk, and the device each one computes on.

`open_mesh()` is called once per process. A world of one is not a special case: it gets a process
group of its own and its collectives are the identity. Axes, for 4 ranks with ep = 2:

    dp    all ranks                        0 1 2 3     dense parameters are sharded over it
    ep    ranks that share the experts     0 1 | 2 3   neighbours, so that they share a machine
    edp   replicas of the same experts     0 2 | 1 3   expert parameters are sharded over it

Backends: gloo for tensors in CPU memory, NCCL for tensors on a GPU. A second, gloo-only group is
made for background work (saving), because collectives of two threads must never meet in one group.
On the CPU, axes whose ranks share a machine exchange rows in memory (ptm/mesh/shared.py).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ptm.common import env
from ptm.common.errors import RecipeError, line
from ptm.mesh.collectives import Ledger, all_reduce_sum
from ptm.mesh.peers import lost
from ptm.mesh.shared import MakePort, port_of, share, unshare


@dataclass(frozen=True)
class Mesh:
    """The ranks of this run. Made by `open_mesh`, closed by `close`."""

    rank: int
    world: int
    device: torch.device
    dp: DeviceMesh
    ep: DeviceMesh
    edp: DeviceMesh
    background: dist.ProcessGroup
    ledger: Ledger

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Sum of a small tensor of counters over the ranks; the argument is left alone."""
        return all_reduce_sum(counts.clone(), self.dp.get_group(), self.ledger)

    def agreement(self, timeout_s: int) -> Callable[[int], None]:
        """A function that returns when every rank has called it, for one thread that is not the
        one that trains. All ranks make it together."""
        if self.world == 1:
            return lambda step: None
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

        def agree(step: int) -> None:
            try:
                dist.all_reduce(torch.tensor([step]), group=group)
            except RuntimeError as error:
                raise lost(error) from error

        return agree

    @property
    def transport(self) -> str:
        """How rows travel over all ranks: in one word, for the head of a run."""
        if self.device.type != "cpu":
            return "nccl"
        return "gloo" if port_of(self.dp.get_group()) is None else "shared memory"

    def groups(self) -> list[dist.ProcessGroup]:
        """Those of the axes that have more than one rank, each once."""
        found = {
            axis.get_group().group_name: axis.get_group() for axis in (self.dp, self.ep, self.edp)
        }
        return [group for group in found.values() if group.size() > 1]

    def close(self) -> None:
        for group in self.groups():
            unshare(group)
        if dist.is_initialized():
            dist.destroy_process_group()


def open_mesh(timeout_s: int, ep: int = 1, make_port: MakePort | None = None) -> Mesh:
    """Join the other ranks (torchrun's or Slurm's variables), or stand alone.

    make_port: what exchanges rows between ranks of one machine, on the CPU; without it gloo does.
    Raises: RecipeError where ep does not divide the ranks; torch's DistBackendError /
    DistNetworkError if the peers cannot be reached within timeout_s.
    """
    me = env.ranks()
    check_ep(ep, me.world)
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
    background = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(background, dist.ProcessGroup)
    mesh = make_mesh(device, background, ep)
    if make_port is not None and not is_cuda:
        share_groups(mesh, make_port, timeout_s)
    return mesh


def share_groups(mesh: Mesh, make_port: MakePort, timeout_s: float) -> None:
    """Have the groups of all axes exchange rows in memory where their ranks share a machine."""
    for group in mesh.groups():
        share(group, make_port, timeout_s)


def make_mesh(device: torch.device, background: dist.ProcessGroup, ep: int = 1) -> Mesh:
    """Name the axes over the ranks of the default process group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    check_ep(ep, world)
    dp = DeviceMesh(device.type, torch.arange(world), mesh_dim_names=("dp",))
    # Equal groups are one object: torch would open a second set of connections for each.
    edp_ep = torch.arange(world).view(world // ep, ep)
    if 1 < ep < world:
        grid = DeviceMesh(device.type, edp_ep, mesh_dim_names=("edp", "ep"))
        return Mesh(rank, world, device, dp, grid["ep"], grid["edp"], background, Ledger())
    alone = dp if world == 1 else _alone(device, world)
    axes = (alone, dp) if ep == 1 else (dp, alone)
    return Mesh(rank, world, device, dp, *axes, background, Ledger())


def _alone(device: torch.device, world: int) -> DeviceMesh:
    """Every rank in a group of one."""
    grid = DeviceMesh(device.type, torch.arange(world).view(world, 1), mesh_dim_names=("all", "me"))
    return grid["me"]


def check_ep(ep: int, world: int) -> None:
    """Raise RecipeError unless experts can be shared out over `ep` of `world` ranks."""
    if world % ep:
        fits = [n for n in range(1, world + 1) if world % n == 0]
        rule = f"must divide the {world} ranks"
        raise RecipeError(line("engine.ep", ep, rule, f"give one of {fits}"))
