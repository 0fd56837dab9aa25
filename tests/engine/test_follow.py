"""Where in the traced step two threads are, and which orders that makes due."""

from __future__ import annotations

from collections.abc import Iterable

from support.pages import Fetch, TinySchedule

from ptm.engine.follow import MOST_LATE, WINDOW, Follower

UPDATE = "update block"
WORK = "forward block"
USES = [
    *[(0, WORK), (1, WORK), (2, WORK), (10, UPDATE)],
    *[(1, WORK), (11, UPDATE), (12, UPDATE), (0, WORK)],
]
WORKS = [page for page, what in USES if what == WORK]
UPDATES = [page for page, what in USES if what == UPDATE]


def follower(at: Iterable[int] = (), uses: list[tuple[int, str]] = USES) -> Follower:
    return Follower(TinySchedule(uses, [fetch(i) for i in at]))


def fetch(at: int) -> Fetch:
    return Fetch(at, 99, (at + 3) % len(USES), None)


def see(found: Follower, *pages: int, what: str = WORK) -> list[int]:
    """Positions of the orders that these accesses make due."""
    return [order.at for page in pages for order in found.saw(page, what)]


def begin(found: Follower) -> list[int]:
    return [order.at for order in found.begin()]


def test_in_the_order_of_the_trace_every_access_is_a_position() -> None:
    found = follower([-1, 0, 3, 7])
    for _ in range(3):
        assert begin(found) == [-1] and found.position == -1
        due = []
        for at, (page, what) in enumerate(USES):
            due += see(found, page, what=what)
            assert found.position == at
        assert due == [0, 3, 7]


def test_updates_that_lag_hold_the_position_back_over_the_border() -> None:
    found = follower([-1, 3, 5, 7])
    begin(found)
    assert see(found, *WORKS) == [] and found.position == 2
    assert see(found, UPDATES[0], what=UPDATE) == [3] and found.position == 4
    assert begin(found) == [] and found.position == 4  # the step before is not over
    assert see(found, *WORKS[:2]) == []
    assert see(found, *UPDATES[1:], what=UPDATE) == [5, 7, -1] and found.position == 1
    assert see(found, *WORKS[2:]) == [] and found.position == 2
    assert see(found, UPDATES[0], what=UPDATE) == [3]


def test_updates_never_seen_hold_nothing_back_for_more_than_a_step() -> None:
    found = follower([-1, 2])
    begin(found)
    see(found, *WORKS)
    begin(found)
    see(found, *WORKS)
    assert found.position == 2
    assert begin(found) == [-1, 2, -1] and found.position == -1  # those of the second step too
    assert see(found, *WORKS) == [2]


def test_an_order_of_the_threads_own_is_no_hindrance() -> None:
    """Updates run before the accesses of the other thread that came first in the trace."""
    found = follower([4])
    begin(found)
    see(found, *WORKS[:2])
    assert see(found, *UPDATES, what=UPDATE) == [] and found.position == 1
    assert see(found, *WORKS[2:]) == [4] and found.position == len(USES) - 1


def test_what_is_off_the_trace_moves_nothing_and_what_is_near_is_passed() -> None:
    found = follower([0, 1])
    begin(found)
    assert (
        see(found, 55, UPDATES[0]) == [] and found.position == -1
    )  # a page of updates, not so used
    assert see(found, *WORKS, what="") == [] and found.position == -1  # a checkpoint reads
    assert see(found, WORKS[1]) == [0, 1] and found.position == 1
    far = follower(uses=[(page, WORK) for page in range(2 * WINDOW)])
    begin(far)
    assert see(far, WINDOW) == [] and far.position == -1
    see(far, WINDOW - 1)
    assert far.position == WINDOW - 1


def test_a_trace_without_updates_ends_with_the_step() -> None:
    found = follower([-1, 1], uses=[(0, WORK), (1, WORK)])
    for _ in range(2):
        assert begin(found) == [-1]
        assert see(found, 0, 1) == [1]


def test_what_is_put_off_comes_back_until_it_is_needed() -> None:
    found = follower()
    begin(found)
    see(found, WORKS[0])
    for _ in range(MOST_LATE + 5):
        found.put_off(fetch(0))
    assert len(found.late) == MOST_LATE
    assert found.with_late([fetch(1)]) == [*[fetch(0)] * MOST_LATE, fetch(1)]
    found.put_off(fetch(0))  # needed at 3
    see(found, *WORKS[1:])
    see(found, UPDATES[0], what=UPDATE)
    assert found.with_late([]) == []


def test_what_was_put_off_for_the_next_step_is_kept_over_the_border() -> None:
    found = follower()
    begin(found)
    see(found, *WORKS)
    see(found, *UPDATES, what=UPDATE)
    wraps, ends = fetch(6), fetch(2)
    assert wraps.needed_at == 1 and found.needed(wraps) == 1 + len(USES)
    found.put_off(ends)
    found.put_off(wraps)
    begin(found)
    assert found.with_late([]) == [wraps] and found.needed(wraps) == 1
