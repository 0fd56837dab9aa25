"""The ranks that make an export together: who does what, and how what they found meets.

Every rank goes through all layers and has all rows of text between them. Within a layer:

    rows      are SPANS runs of batches, however many ranks there are; each rank has some runs
    linears   that all rows go through: each is solved by one rank, and all get its weights
    experts   each is one rank's, rows and linears; those with most tokens first

Whatever is added up over rows is added as one tree over the spans, ((0 1)(2 3))((4 5)(6 7)), of
which the spans of a rank are a branch. So no sum and no product depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ptm.mesh.collectives import Ledger, gather
from ptm.mesh.peers import Peers

SPANS = 8
ALIGNED = 16
"""Bytes; where a tensor may begin in a message."""


class Crew:
    """The ranks of `peers`; without, one that does everything."""

    def __init__(self, peers: Peers | None = None) -> None:
        self.peers = peers or Peers()
        self.rank, self.world = self.peers.rank, self.peers.world
        self.is_main = self.rank == 0
        self._ledger = Ledger()
        readers = 1 << (min(self.world, SPANS).bit_length() - 1)
        width = SPANS // readers
        self._spans = range(SPANS)[self.rank * width : (self.rank + 1) * width]

    def batches(self, count: int) -> slice:
        """Of so many batches those that are this rank's."""
        if not self._spans:
            return slice(0, 0)
        return slice(_cut(self._spans.start, count), _cut(self._spans.stop, count))

    def is_mine(self, index: int) -> bool:
        """Of a list of equal tasks, whether one is this rank's."""
        return index % self.world == self.rank

    def rounds(self, sizes: Tensor) -> Iterator[tuple[list[int], list[int]]]:
        """Indices of sizes (E,), largest first, as many at a time as there are ranks; the second
        list has the one that is this rank's, if any."""
        order = torch.argsort(sizes, descending=True, stable=True).tolist()
        for i in range(0, len(order), self.world):
            now = order[i : i + self.world]
            yield now, now[self.rank : self.rank + 1]

    def sum(self, count: int, part: Callable[[slice], Tensor]) -> Tensor:
        """The sum over `count` batches. part: of some of this rank's batches, a new tensor."""
        mine = {}
        if self._spans:
            first = self.batches(count).start
            cuts = [_cut(s, count) - first for s in (*self._spans, self._spans.stop)]
            mine[str(self.rank)] = _branch(cuts, part)
        found = list(self.exchange(mine).values())
        while len(found) > 1:
            found = [a.add_(b) for a, b in zip(found[::2], found[1::2])]
        return found[0]

    def join(self, mine: list[Tensor]) -> list[Tensor]:
        """All batches, of which each rank has its own."""
        return list(self.exchange({f"{self.rank}.{i}": x for i, x in enumerate(mine)}).values())

    def exchange(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every rank's tensors, in the order of ranks; no two have a name in common."""
        if self.world == 1:
            return dict(mine)
        heads = self.peers.gather([(n, list(t.shape), str(t.dtype)) for n, t in mine.items()])
        places = [[_Place(*head) for head in of_rank] for of_rank in heads]
        cuts = [0, *accumulate(sum(p.room for p in of_rank) for of_rank in places)]
        full = torch.empty(cuts[-1], dtype=torch.uint8)
        found: dict[str, Tensor] = {}
        for start, of_rank in zip(cuts, places):
            for place in of_rank:
                found[place.name] = place.of(full[start:])
                start += place.room
        for name, tensor in mine.items():
            found[name].copy_(tensor)
        assert self.peers.group is not None
        gather(full, cuts, self.peers.group, self._ledger).wait()
        return found

    def main_first(self, task: Callable[[], Any]) -> Any:
        """What `task` gives, done by rank 0 before the others; where one fails, all do."""
        found: list[Any] = []
        for is_turn in (self.is_main, not self.is_main):
            self.peers.together(lambda now=is_turn: found.append(task()) if now else None)
        return found[0]

    def on_main(self, task: Callable[[], Any]) -> Any:
        """What `task` gives (a JSON value), done by rank 0 alone; where it fails, all do."""
        return self.peers.together(lambda: task() if self.is_main else None)[0]


class _Place:
    """A tensor in a message."""

    def __init__(self, name: str, shape: list[int], dtype: str) -> None:
        self.name, self.shape = name, shape
        self.dtype: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
        self.num_bytes = torch.Size(shape).numel() * self.dtype.itemsize
        self.room = -(-self.num_bytes // ALIGNED) * ALIGNED

    def of(self, message: Tensor) -> Tensor:
        return message[: self.num_bytes].view(self.dtype).view(self.shape)


def _cut(span: int, count: int) -> int:
    return count * span // SPANS


def _branch(cuts: list[int], part: Callable[[slice], Tensor]) -> Tensor:
    if len(cuts) == 2:
        return part(slice(*cuts))
    middle = len(cuts) // 2
    found = _branch(cuts[: middle + 1], part)
    return found.add_(_branch(cuts[middle:], part))
