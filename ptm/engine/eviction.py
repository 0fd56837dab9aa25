"""Which page leaves memory when another needs its frame.

`NextUse` sends away the page whose next use is farthest in the future, which is the fewest fetches
that any rule can reach (Belady 1966, IBM Systems Journal 5(2)); the future is the trace of a step,
repeated. Before there is a trace it falls back to `Lru`, which sends away the page whose last use
is farthest in the past. A policy chooses only among the candidates it is given; who is held or on
its way is the store's knowledge. Policies are not thread-safe: the store calls them under its lock.

Both keep their pages in order lazily, so that a choice costs about log n: an entry that is no
longer true is dropped when it comes to the top. A page that was chosen has no entry until it is
touched again; so a page fetched ahead of its use is not sent away before it, unless all others are
held.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Set
from typing import Protocol

from ptm.engine.config import PolicyKind


class Uses(Protocol):
    """A repeated step: positions 0 .. num_positions - 1, then 0 again. A Trace, or a Schedule."""

    @property
    def num_positions(self) -> int: ...
    def next_use(self, page: int, position: int) -> int: ...


class EvictionPolicy(Protocol):
    def follow(self, uses: Uses) -> None:
        """The step is known from now on. Called between steps; positions count within a step."""
        ...

    def touched(self, page: int, position: int) -> None:
        """`page` is used at `position` of the step."""
        ...

    def victim(self, candidates: Iterable[int], position: int) -> int:
        """The page to send away, one of `candidates` (at least one; a set is fastest)."""
        ...


class Lru:
    """Least recently used. Needs no future."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}

    @property
    def pages(self) -> Iterable[int]:
        """Every page touched and not chosen since, least recent first."""
        return self._order.keys()

    def follow(self, uses: Uses) -> None:
        del uses

    def touched(self, page: int, position: int) -> None:
        del position
        self._order.pop(page, None)
        self._order[page] = None

    def victim(self, candidates: Iterable[int], position: int) -> int:
        del position
        able = candidates if isinstance(candidates, Set) else set(candidates)
        assert able, "no page can leave: all are held"
        chosen = next((page for page in self._order if page in able), None)
        if chosen is None:
            return min(able)
        del self._order[chosen]
        return chosen


class NextUse:
    """Farthest next use first. `follow` gives it the future; until then it is Lru."""

    def __init__(self) -> None:
        self._past = Lru()
        self._uses: Uses | None = None
        self._steps, self._latest = 0, -1
        self._due: dict[int, int] = {}
        self._farthest: list[tuple[int, int]] = []
        # Pages that came to the top while they could not leave: held, or no longer in a frame.
        self._aside: dict[int, None] = {}

    def follow(self, uses: Uses) -> None:
        count = uses.num_positions
        self._uses, self._steps, self._latest = uses, 0, -1
        self._due = {page: uses.next_use(page, count - 1) - count for page in self._past.pages}
        self._order_again()

    def touched(self, page: int, position: int) -> None:
        self._past.touched(page, position)
        if self._uses is not None:
            self._place(page, position)

    def victim(self, candidates: Iterable[int], position: int) -> int:
        able = candidates if isinstance(candidates, Set) else set(candidates)
        if self._uses is None:
            return self._past.victim(able, position)
        assert able, "no page can leave: all are held"
        now, chosen = self._now(position), None
        for page in [page for page in self._aside if page in able]:
            del self._aside[page]
            heapq.heappush(self._farthest, (-self._due[page], page))
        while self._farthest and chosen is None:
            due, page = heapq.heappop(self._farthest)
            if self._due.get(page) != -due:
                continue
            if page not in able:
                self._aside[page] = None
            elif -due <= now:
                # Its use went by unseen (a step that was cut short): look for the next.
                self._place(page, position)
            else:
                chosen = page
        if chosen is None:
            uses = self._uses
            chosen = max(able, key=lambda page: (uses.next_use(page, position), -page))
        self._due.pop(chosen, None)
        return chosen

    def _place(self, page: int, position: int) -> None:
        assert self._uses is not None
        now = self._now(position)
        due = now - position + self._uses.next_use(page, position)
        self._due[page] = due
        self._aside.pop(page, None)
        heapq.heappush(self._farthest, (-due, page))
        if len(self._farthest) > 4 * len(self._due) + 64:
            self._order_again()

    def _order_again(self) -> None:
        # Entries that are no longer true would pile up where nothing is ever evicted.
        self._farthest = [(-due, page) for page, due in self._due.items()]
        heapq.heapify(self._farthest)
        self._aside.clear()

    def _now(self, position: int) -> int:
        """`position` counted on through all steps."""
        assert self._uses is not None
        if position < self._latest:
            self._steps += 1
        self._latest = position
        return self._steps * self._uses.num_positions + position


POLICIES: dict[PolicyKind, type[Lru] | type[NextUse]] = {
    PolicyKind.next_use: NextUse,
    PolicyKind.lru: Lru,
}
