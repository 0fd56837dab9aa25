"""Groups whose ranks share a machine, and the port through which each exchanges rows in memory.

The port itself is a kernel (ptm/kernels/shm.py), handed to `open_mesh` as a function that makes
one. `share` lets the ranks of a group find out together whether all of them can use it: the same
boot of the same machine, and memory that all of them can map. If one cannot, all stay with gloo.

What is sent, what is received, and the sums made of it are those of gloo's path, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from ptm.mesh.peers import Peers

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Port(Protocol):
    """What ptm/kernels/shm.py makes."""

    rank: int

    @property
    def place(self) -> list[int]: ...
    def join(self, places: Sequence[Sequence[int]], names: Sequence[str] = ()) -> None: ...
    def start(
        self, writes: Sequence[tuple[int, Tensor]], reads: Sequence[tuple[int, bool, Tensor]]
    ) -> Any: ...
    def close(self) -> None: ...


MakePort = Callable[[int, int, float], Port | None]
"""(rank, ranks, timeout in seconds) -> a port that has not joined, or None."""

_ports: dict[str, Port] = {}


def share(group: dist.ProcessGroup, make: MakePort, timeout_s: float) -> None:
    """Have `group` exchange rows in memory if all its ranks can; they call this together."""
    peers = Peers(group)
    port = make(peers.rank, peers.world, timeout_s)
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else None
    found = peers.gather([boot, port and port.place])
    boots, places = zip(*found)
    can_join = port is not None and boot is not None and None not in places and len({*boots}) == 1
    if port is not None and can_join:
        try:
            ranks = dist.get_process_group_ranks(group)
            port.join(places, [f"rank {rank} (pid {p[0]})" for rank, p in zip(ranks, places)])
        except OSError:
            can_join = False
    if all(peers.gather(can_join)):
        assert port is not None
        _ports[group.group_name] = port
    elif port is not None:
        port.close()


def unshare(group: dist.ProcessGroup) -> None:
    """Close the group's port, if it has one."""
    port = _ports.pop(group.group_name, None)
    if port is not None:
        port.close()


def port_of(group: dist.ProcessGroup) -> Port | None:
    return _ports.get(group.group_name)


def gather(port: Port, full: Tensor, cuts: Sequence[int]) -> Any:
    """As collectives.gather; returns what is to be waited for."""
    pieces = [full[start:stop] for start, stop in zip(cuts, cuts[1:])]
    reads = [(r, True, piece) for r, piece in enumerate(pieces) if r != port.rank]
    return port.start([(port.rank, pieces[port.rank])], reads)


def exchange(
    port: Port, out: Tensor, received: Sequence[int], rows: Tensor, sent: Sequence[int]
) -> Any:
    """The first sent[0] rows go to rank 0, ...; received[0] come from it first in `out`."""
    come, go = out.split(list(received)), rows.split(list(sent))
    come[port.rank].copy_(go[port.rank])
    others = [r for r in range(len(go)) if r != port.rank]
    return port.start([(r, go[r]) for r in others], [(r, False, come[r]) for r in others])
