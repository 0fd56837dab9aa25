"""The collectives of the engines, with a ledger of the bytes that each one sends beside the least
possible.

    gather          every rank's range of a flat tensor, in place            1.00 of the bound
    scatter_sum     sum of every rank's copy of this rank's range            1.00
    all_to_all      rows to the ranks that want them, with autograd          1.00
    all_reduce_sum  a few numbers

Ranges may differ in length. On gloo a gather is one broadcast per rank, all under way at once, and
a sum is an all-to-all followed by additions in fp32, in rank order: `reduce_scatter_tensor` is an
all-reduce there and moves twice the bytes (pytorch#149869), and its result depends on timing. On a
group of one, all of them are the identity. Groups whose ranks share a machine move the same bytes
through memory (ptm/mesh/shared.py).

They are started by the thread that trains, in the same order on every rank; what they return is
waited for later, so that they overlap with computing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ptm.mesh import shared
from ptm.mesh.peers import lost

# torch 2.13 renamed it, and warns on each call of the old name.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ADDED_AT_ONCE = 2**17
"""Elements: torch widens bf16 into a copy first, which is to stay in a cache."""


@dataclass
class Entry:
    """What one kind of collective has cost this rank so far."""

    calls: int = 0
    sent_bytes: int = 0
    bound_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Ledger:
    """Bytes and seconds by collective; the bound is what any algorithm must send from each rank."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, name: str, sent_bytes: int, bound_bytes: int) -> None:
        entry = self.entries.setdefault(name, Entry())
        entry.calls += 1
        entry.sent_bytes += sent_bytes
        entry.bound_bytes += bound_bytes

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count the seconds inside; a peer that is gone or late becomes a HangError."""
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's word for it
            raise lost(error) from error
        self.entries.setdefault(name, Entry()).seconds += time.perf_counter() - started

    @property
    def seconds(self) -> float:
        return sum(entry.seconds for entry in self.entries.values())


class Pending:
    """A collective under way. `wait` once, before its result is read or its input is changed."""

    def __init__(self, name: str, ledger: Ledger, works: Sequence[Any]) -> None:
        self.name, self.ledger, self.works = name, ledger, works

    def wait(self) -> None:
        if self.works:
            with self.ledger.waiting(self.name):
                for work in self.works:
                    work.wait()
        self.works = ()


class PendingSum(Pending):
    """A `scatter_sum` under way; `add_to` waits and adds what came."""

    received_NS: Tensor

    def add_to(self, total_S: Tensor) -> None:
        """Add every rank's piece to total_S (S,), in rank order, in total_S's type."""
        self.wait()
        spans = range(0, len(total_S), ADDED_AT_ONCE)
        for span in (slice(start, start + ADDED_AT_ONCE) for start in spans):
            for piece_S in self.received_NS:
                total_S[span] += piece_S[span]


def gather(
    full: Tensor,
    cuts: Sequence[int],
    group: dist.ProcessGroup,
    ledger: Ledger,
    name: str = "gather",
) -> Pending:
    """Fill `full` (G,) where this rank has filled [cuts[r], cuts[r + 1]) and each other rank its
    own range. cuts: N + 1 positions."""
    world, rank = group.size(), group.rank()
    if world == 1:
        return Pending(name, ledger, ())
    sizes = [stop - start for start, stop in zip(cuts, cuts[1:])]
    sent_bytes = (world - 1) * sizes[rank] * full.element_size()
    ledger.add(name, sent_bytes, sent_bytes)
    port = shared.port_of(group)
    with ledger.waiting(name):
        if port is not None:
            works = [shared.gather(port, full, cuts)]
        elif full.is_cuda and len(set(sizes)) == 1:
            mine = full[cuts[rank] : cuts[rank + 1]]
            works = [_all_gather_flat(full[cuts[0] : cuts[-1]], mine, group=group, async_op=True)]
        else:
            works = [
                dist.broadcast(full[start:stop], group_src=r, group=group, async_op=True)
                for r, (start, stop) in enumerate(zip(cuts, cuts[1:]))
                if stop > start
            ]
    return Pending(name, ledger, works)


def scatter_sum(
    full: Tensor,
    cuts: Sequence[int],
    group: dist.ProcessGroup,
    ledger: Ledger,
    *,
    buffer: Tensor | None = None,
    name: str = "scatter_sum",
) -> PendingSum:
    """Send range r of `full` (G,) to rank r. What comes is summed by `PendingSum.add_to`.

    buffer: room for N times this rank's range, of full's type; one is made where it is None.
    """
    world, rank = group.size(), group.rank()
    sizes = [stop - start for start, stop in zip(cuts, cuts[1:])]
    mine = sizes[rank]
    if world == 1:
        pending = PendingSum(name, ledger, ())
        pending.received_NS = full[None, cuts[0] : cuts[1]]
        return pending
    room = full.new_empty(world * mine) if buffer is None else buffer[: world * mine]
    sent_bytes = (sum(sizes) - mine) * full.element_size()
    ledger.add(name, sent_bytes, sent_bytes)
    with ledger.waiting(name):
        work = _exchange(room, [mine] * world, full[cuts[0] : cuts[-1]], sizes, group)
    pending = PendingSum(name, ledger, (work,))
    pending.received_NS = room.view(world, mine)
    return pending


def all_to_all(
    rows_SD: Tensor,
    sent: Sequence[int],
    received: Sequence[int],
    group: dist.ProcessGroup,
    ledger: Ledger,
    name: str = "all_to_all",
) -> tuple[Tensor, Pending]:
    """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1, ...; no autograd.

    Shapes: rows (sum(sent), ...) -> (sum(received), ...), to be read after `wait`.
    """
    if group.size() == 1:
        return rows_SD, Pending(name, ledger, ())
    rows_SD = rows_SD.contiguous()
    out = rows_SD.new_empty(sum(received), *rows_SD.shape[1:])
    row_bytes = rows_SD[:1].numel() * rows_SD.element_size() if len(rows_SD) else 0
    others = sum(sent) - sent[group.rank()]
    ledger.add(name, others * row_bytes, others * row_bytes)
    with ledger.waiting(name):
        work = _exchange(out, list(received), rows_SD, list(sent), group)
    return out, Pending(name, ledger, (work,))


def _exchange(
    out: Tensor, received: list[int], rows: Tensor, sent: list[int], group: dist.ProcessGroup
) -> Any:
    port = shared.port_of(group)
    if port is not None:
        return shared.exchange(port, out, received, rows, sent)
    return dist.all_to_all_single(out, rows, received, sent, group=group, async_op=True)


def all_reduce_sum(values: Tensor, group: dist.ProcessGroup, ledger: Ledger) -> Tensor:
    """Sum of a small tensor over the ranks, in place; for flags and counters, where bytes do not
    matter."""
    world = group.size()
    if world > 1:
        moved = 2 * (world - 1) * values.nbytes // world
        ledger.add("all_reduce", moved, moved)
        with ledger.waiting("all_reduce"):
            dist.all_reduce(values, group=group)
    return values
