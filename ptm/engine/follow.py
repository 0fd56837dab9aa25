"""Where in the traced step the run is, and which orders of the schedule are due.

The position is the last access of the trace that has happened together with all before it. Threads
work side by side, so accesses come a little out of order: one that is at most `WINDOW` ahead is
remembered and passed over later. An access that the trace does not have there, like those of an
evaluation, moves nothing. If the expected one does not come at all, the position moves on once
`LATE` later ones are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

WINDOW = 64
LATE = 32
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
    def next_use(self, page: int, position: int) -> int: ...


class Follower:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.pages = [access.page for access in schedule.trace.accesses]
        self.position = -1
        self._orders: dict[int, list[Order]] = {}
        for order in schedule.orders:
            self._orders.setdefault(order.at, []).append(order)
        self._ahead: set[int] = set()
        self.late: list[Order] = []
        "Orders put off for want of a frame; at most MOST_LATE."

    def begin(self) -> list[Order]:
        """A step begins; returns what is due before its first access."""
        self.position = -1
        self._ahead.clear()
        self.late = [order for order in self.late if order.needed_at <= order.at]
        return self._orders.get(-1, [])

    def saw(self, page: int) -> Sequence[Order]:
        """`page` is held now; returns the orders that are due by that."""
        expected, count = self.position + 1, len(self.pages)
        if expected < count and self.pages[expected] == page:
            return self._move(expected)
        for position in range(expected + 1, min(expected + WINDOW, count)):
            if self.pages[position] == page and position not in self._ahead:
                self._ahead.add(position)
                if len(self._ahead) >= LATE:
                    return self._move(min(self._ahead))
                break
        return ()

    def needed(self, order: Order) -> int:
        """Position at which the order's page is used, counted on into the next step."""
        wraps = order.needed_at <= order.at and self.position >= order.at
        return order.needed_at + (len(self.pages) if wraps else 0)

    def put_off(self, order: Order) -> None:
        if len(self.late) < MOST_LATE:
            self.late.append(order)

    def with_late(self, orders: Sequence[Order]) -> list[Order]:
        """What was put off and is still ahead of its need, then `orders`."""
        late, self.late = self.late, []
        return [order for order in late if self.needed(order) > self.position] + [*orders]

    def _move(self, to: int) -> Sequence[Order]:
        """To `to`, and over all after it that have happened; orders of what is passed are due."""
        ahead, orders = self._ahead, self._orders
        first = self.position + 1
        if to == first and not ahead:  # the usual case
            self.position = to
            return orders.get(to, ())
        ahead.discard(to)
        while to + 1 in ahead:
            to += 1
            ahead.discard(to)
        self.position = to
        return [order for at in range(first, to + 1) for order in orders.get(at, ())]
