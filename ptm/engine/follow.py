"""Where in the traced step the run is, and which orders of the schedule are due.

Two threads use pages, each in the order of the trace: one runs forward and backward, the other
updates. So each has a place of its own, and the position is the last access of the trace that has
happened together with all before it:

    trace        F F F F B B B u B B u u u | F F F F B ...     u: update
    happened     x x x x x x x x x x . . .   x x x             a step begins, updates lag behind
                                   |`- position

An access that its thread does not have among the next `WINDOW` of the trace moves nothing, and so
does one for no purpose that was noted, like a checkpoint's; what is skipped counts as passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

WINDOW = 16
MOST_LATE = 32


class Order(Protocol):
    @property
    def at(self) -> int: ...
    @property
    def page(self) -> int: ...
    @property
    def needed_at(self) -> int: ...
    @property
    def evicts(self) -> int | None: ...


class Schedule(Protocol):
    @property
    def trace(self) -> Any: ...
    @property
    def orders(self) -> Sequence[Any]: ...
    @property
    def flushes(self) -> Sequence[Any]: ...
    def next_use(self, page: int, position: int) -> int: ...


def is_update(what: str) -> bool:
    """Whether an access is one of the thread that updates."""
    return what.startswith("update ")


class Lane:
    """One thread's accesses, and which of them comes next."""

    def __init__(self, positions: list[int], pages: list[int]) -> None:
        self.positions = positions
        self.pages = pages
        self.step = self.at = 0

    @property
    def is_done(self) -> bool:
        return self.at >= len(self.positions)

    def saw(self, page: int) -> int | None:
        """Go on past `page`, if it is near; returns where it was."""
        for at in range(self.at, min(self.at + WINDOW, len(self.pages))):
            if self.pages[at] == page:
                self.at = at + 1
                return self.positions[at]
        return None


class Follower:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        accesses = schedule.trace.accesses
        self.count = len(accesses)
        self.position = self.count - 1  # no step has begun
        "In [-1, count): of this step or, while its updates lag, of the one before."
        self.late: list[Order] = []
        "Orders put off for want of a frame; at most MOST_LATE."
        self.over: set[int] = set()
        "Pages in hand that a commit takes as they are when released."
        self._issued: dict[int, Order] = {}
        self._last_changes = {flush.at for flush in schedule.flushes}
        self._step = self._steps = 0
        "Of the position, and of the thread that trains."
        self._orders: dict[int, list[Order]] = {}
        for order in schedule.orders:
            self._orders.setdefault(order.at, []).append(order)
        self._lanes = {}
        for kind in (False, True):
            mine = [i for i, access in enumerate(accesses) if is_update(access.what) == kind]
            self._lanes[kind] = Lane(mine, [accesses[i].page for i in mine])

    def begin(self) -> list[Order]:
        """A step begins; returns what is due before its first access."""
        works, updates = self._lanes[False], self._lanes[True]
        self._steps += 1
        works.step, works.at = self._steps, 0
        if updates.is_done or updates.step < self._steps - 1 or self._steps == 1:
            updates.step, updates.at = self._steps, 0
        return list(self._settle())

    def saw(self, page: int, what: str) -> Sequence[Order]:
        """`page` is held now, for `what`; returns the orders that are due by that."""
        kind = is_update(what)
        lane = self._lanes[kind]
        at = lane.saw(page) if what else None
        if at is None:
            return ()
        if at in self._last_changes:
            self.over.add(page)
        if kind and lane.is_done and lane.step < self._steps:
            lane.step, lane.at = self._steps, 0
        return list(self._settle())

    def _settle(self) -> Iterator[Order]:
        """Move the position to before the first access that is still to come."""
        ends = [
            (lane.step, self.count if lane.is_done else lane.positions[lane.at])
            for lane in self._lanes.values()
            if lane.positions
        ]
        step, stop = min(ends, default=(self._steps, 0))
        while self._step < step:
            yield from self._due(self.count)
            self._step, self.position = self._step + 1, -1
            self.late = [order for order in self.late if order.needed_at <= order.at]
            yield from self._orders.get(-1, ())
        yield from self._due(stop)

    def _due(self, stop: int) -> Iterator[Order]:
        for at in range(self.position + 1, stop):
            self.position = at
            yield from self._orders.get(at, ())

    def needed(self, order: Order) -> int:
        """Position at which the order's page is used, counted on into the next step."""
        wraps = order.needed_at <= order.at and self.position >= order.at
        return order.needed_at + (self.count if wraps else 0)

    def put_off(self, order: Order) -> None:
        if len(self.late) < MOST_LATE:
            self.late.append(order)

    def again(self, pages: Iterable[int]) -> None:
        """Put off the orders of `pages`, which were begun in vain."""
        for page in pages:
            if page in self._issued:
                self.put_off(self._issued[page])

    def with_late(self, orders: Sequence[Order]) -> list[Order]:
        """What was put off and is still ahead of its need, then `orders`."""
        late, self.late = self.late, []
        found = [order for order in late if self.needed(order) > self.position] + [*orders]
        self._issued.update((order.page, order) for order in found)
        return found
