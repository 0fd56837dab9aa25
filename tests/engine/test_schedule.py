"""Schedules obeyed by a pretend store, compared with exhaustive search, and with arithmetic."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.engine.config import PolicyKind
from ptm.engine.schedule import Schedule, make_schedule
from ptm.engine.trace import Trace, synthetic_trace

PAGE = 4 << 20
steps_of_pages = st.lists(st.tuples(st.integers(0, 7), st.booleans()), min_size=1, max_size=24)


def trace_of(uses: list[tuple[int, bool]], seconds: float = 1.0) -> Trace:
    return synthetic_trace([(f"forward {p % 3}", [p], write, seconds) for p, write in uses])


def schedule_of(trace: Trace, num_frames: int, rate: float = math.inf, **more: object) -> Schedule:
    return make_schedule(
        trace, num_frames=num_frames, page_bytes=PAGE, read_bytes_per_s=rate,
        write_bytes_per_s=rate, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def obey(schedule: Schedule, num_held: int) -> tuple[int, int]:
    """Run three steps on frames that do exactly what the orders say; count fetches and writes of
    the last. Fails when a page is not there, is evicted in hand, or dirty data would be lost."""
    trace, count = schedule.trace, schedule.num_positions
    frames, dirty, hand = set(schedule.resident), set[int](), list[int]()
    assert len(frames) <= schedule.num_frames
    reads = writes = 0
    for step in range(3):
        reads = writes = 0
        for position, access in enumerate(trace.accesses):
            assert access.page in frames, (step, position, access.page)
            dirty |= {access.page} if access.is_write else set()
            hand = [*hand, access.page][-num_held:]
            for order in (o for o in schedule.orders if o.at == position):
                still_in_hand = hand[-(num_held - 1) :] if num_held > 1 else []
                assert order.evicts in frames and order.page not in frames
                assert order.evicts not in still_in_hand
                needed = order.needed_at + (count if order.needed_at <= position else 0)
                assert trace.next_use(order.page, position) == needed
                assert trace.next_use(order.evicts, position) > needed or (
                    schedule.policy is PolicyKind.lru
                )
                frames = (frames - {order.evicts}) | {order.page}
                reads += 1
                writes += order.evicts in dirty
                dirty.discard(order.evicts)
                assert len(frames) <= schedule.num_frames
    return reads * PAGE, writes * PAGE


@given(
    steps_of_pages,
    st.integers(1, 8),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(0, 5)),
    st.sampled_from(PolicyKind),
)
@settings(max_examples=400, deadline=None)
def test_every_access_finds_its_page(
    uses: list[tuple[int, bool]],
    num_frames: int,
    num_held: int,
    num_spare: int | None,
    policy: PolicyKind,
) -> None:
    schedule = schedule_of(
        trace_of(uses), num_frames, num_held=num_held, num_spare=num_spare, policy=policy
    )
    moved = obey(schedule, min(num_held, num_frames))
    assert moved == (schedule.read_bytes, schedule.written_bytes)
    assert schedule.stall_s == 0 and schedule.step_s == pytest.approx(schedule.trace.step_s)


def least_fetches(trace: Trace, num_frames: int) -> int:
    """Fewest fetches of any way to live every step alike: each set of kept gaps tried."""
    count = trace.num_positions
    gaps = [(i, j) for i, j in enumerate(trace.following)]
    for dropped in range(count + 1):
        for out in itertools.combinations(range(count), dropped):
            load = [0] * count
            for k, (i, j) in enumerate(gaps):
                for position in range(i, i + 1 if k in out else j):
                    load[position % count] += 1
            if max(load) <= num_frames:
                return dropped
    raise AssertionError("not even one frame")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_fetches_are_as_few_as_possible_and_lru_needs_no_fewer(
    pages: list[int], num_frames: int
) -> None:
    trace = trace_of([(page, False) for page in pages])
    best = schedule_of(trace, num_frames, num_held=1, num_spare=0)
    lru = schedule_of(trace, num_frames, num_held=1, num_spare=0, policy="lru")
    assert len(best.orders) <= len(lru.orders)
    assert len(best.orders) == least_fetches(trace, num_frames)
