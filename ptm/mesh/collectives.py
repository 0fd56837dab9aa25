"""The collectives of the engine, with a ledger of the bytes that each one sends beside the least
possible.

Reduce-scatter is an all-to-all followed by a sum in rank order: on gloo it moves half of what
`reduce_scatter_tensor` does (which is an all-reduce there, pytorch#149869), and its result does not
depend on timing. On a group of one, all of them are the identity.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ptm.mesh.peers import lost

# torch 2.13 renamed it, and warns on each call of the old name.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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

    @contextmanager
    def record(self, name: str, sent_bytes: int, bound_bytes: int) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's word for a peer that is gone or late
            raise lost(error) from error
        entry = self.entries.setdefault(name, Entry())
        entry.calls += 1
        entry.sent_bytes += sent_bytes
        entry.bound_bytes += bound_bytes
        entry.seconds += time.perf_counter() - started

    @property
    def seconds(self) -> float:
        return sum(entry.seconds for entry in self.entries.values())


def reduce_scatter_sum(pieces_NS: Tensor, group: dist.ProcessGroup, ledger: Ledger) -> Tensor:
    """Sum row r of every rank's pieces_NS (N, S) on rank r, adding in rank order. Returns (S,).

    Modifies: nothing for N > 1; for N = 1 the result is a view of the input.
    """
    world = group.size()
    if world == 1:
        return pieces_NS[0]
    piece_bytes = pieces_NS[0].numel() * pieces_NS.element_size()
    with ledger.record("reduce_scatter", (world - 1) * piece_bytes, (world - 1) * piece_bytes):
        received_NS = torch.empty_like(pieces_NS)
        dist.all_to_all_single(received_NS, pieces_NS, group=group)
        total_S = received_NS[0] + received_NS[1]  # of its own, so that the rest can go
        for other_S in received_NS[2:]:
            total_S += other_S
    return total_S


def all_gather(shard_S: Tensor, group: dist.ProcessGroup, ledger: Ledger) -> Tensor:
    """Every rank's shard_S (S,) as rows of (N, S)."""
    world = group.size()
    if world == 1:
        return shard_S[None]
    shard_bytes = shard_S.numel() * shard_S.element_size()
    with ledger.record("all_gather", (world - 1) * shard_bytes, (world - 1) * shard_bytes):
        gathered_NS = shard_S.new_empty(world, shard_S.numel())
        _all_gather_flat(gathered_NS.view(-1), shard_S, group=group)
    return gathered_NS


def all_reduce_sum(values: Tensor, group: dist.ProcessGroup, ledger: Ledger) -> Tensor:
    """Sum of a small tensor over the ranks, in place; for flags and counters, where bytes do not
    matter."""
    if group.size() > 1:
        with ledger.record("all_reduce", 2 * values.nbytes, 2 * values.nbytes):
            dist.all_reduce(values, group=group)
    return values
