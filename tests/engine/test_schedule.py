"""Schedules obeyed by a pretend store, compared with exhaustive search, and with arithmetic."""

import itertools
import math
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.common.errors import OutOfPages
from ptm.engine.config import PolicyKind
from ptm.engine.eviction import NextUse
from ptm.engine.schedule import Schedule, make_schedule, needs_replan
from ptm.engine.scratch import dead_gaps
from ptm.engine.trace import Access, Trace, UnitWork, step_phases, synthetic_trace

PAGE = 4 << 20
steps_of_pages = st.lists(st.tuples(st.integers(0, 7), st.booleans()), min_size=1, max_size=24)


def trace_of(uses: list[tuple[int, bool]], seconds: float = 1.0) -> Trace:
    return synthetic_trace([(f"forward {p % 3}", [p], write, seconds) for p, write in uses])


def schedule_of(trace: Trace, num_frames: int, rate: float = math.inf, **more: object) -> Schedule:
    return make_schedule(
        trace, num_frames=num_frames, page_bytes=PAGE, read_bytes_per_s=rate,
        write_bytes_per_s=rate, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def obey(schedule: Schedule, num_held: int, *, scratch: range, commits: bool) -> tuple[int, int]:
    """Run three steps on frames that do exactly what the orders say; bytes moved in the last.
    Fails when a page is not there, is evicted in hand, or frames run out."""
    trace, count = schedule.trace, schedule.num_positions
    frames, dirty, hand = set(schedule.resident), set[int](), list[int]()
    zeros = set(scratch)
    assert len(frames) <= schedule.num_frames
    reads = writes = 0
    for step in range(3):
        reads = writes = 0
        if commits and step:
            writes += len(dirty - set(scratch))
            dirty &= set(scratch)
        for position, access in enumerate(trace.accesses):
            assert access.page in frames, (step, position, access.page)
            zeros.discard(access.page)
            dirty |= {access.page} if access.is_write else set()
            hand = [*hand, access.page][-num_held:]
            if access.page in scratch and trace.following[position] >= count:
                dirty.discard(access.page)
                zeros.add(access.page)
            for order in (o for o in schedule.orders if o.at == position):
                still_in_hand = hand[-(num_held - 1) :] if num_held > 1 else []
                assert order.evicts in frames and order.page not in frames
                assert order.evicts not in still_in_hand
                needed = order.needed_at + (count if order.needed_at <= position else 0)
                assert trace.next_use(order.page, position) == needed
                assert schedule.next_use(order.evicts, position) > needed
                frames = (frames - {order.evicts}) | {order.page}
                reads += order.page not in zeros
                writes += order.evicts in dirty
                dirty.discard(order.evicts)
    return reads * PAGE, writes * PAGE


@given(
    steps_of_pages,
    st.integers(1, 8),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(0, 5)),
    st.sampled_from(PolicyKind),
    st.integers(5, 8),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_every_access_finds_its_page(
    uses: list[tuple[int, bool]],
    num_frames: int,
    num_held: int,
    num_spare: int | None,
    policy: PolicyKind,
    first_scratch: int,
    commits: bool,
) -> None:
    scratch = range(first_scratch, 8)
    schedule = schedule_of(
        trace_of(uses), num_frames, num_held=num_held, num_spare=num_spare, policy=policy,
        scratch=scratch, commits=commits,
    )  # fmt: skip
    moved = obey(schedule, min(num_held, num_frames), scratch=scratch, commits=commits)
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


def model(num_units: int, weights: int, seconds: float = 0.1) -> tuple[Trace, range]:
    """A step of `num_units` blocks in the proportions of split masters, and its gradient pages."""
    num_weights, num_states = num_units * weights, num_units * weights * 5
    first = num_weights + num_states
    units = []
    for k in range(num_units):
        mine = range(k * weights, (k + 1) * weights)
        sums = range(first + 2 * mine.start, first + 2 * mine.stop)
        states = range(num_weights + 5 * mine.start, num_weights + 5 * mine.stop)
        updates = [(o, [mine[i // 5]], [sums[2 * i // 5]]) for i, o in enumerate(states)]
        units.append(
            UnitWork(
                name=f"block {k}", weights=mine, gradients=sums, updates=updates,
                forward_s=seconds, backward_s=2 * seconds, update_s=seconds,
            )
        )  # fmt: skip
    stop = first + 2 * num_weights
    kinds = [("weights", num_weights), ("states", first), ("grads", stop)]
    return synthetic_trace(step_phases(units), kinds), range(first, stop)


def test_a_stream_over_one_link_takes_the_sum_of_its_pages() -> None:
    # Ten pages read in turn into three frames, no work: nine of ten are always on their way.
    trace = trace_of([(page, False) for page in range(10)], seconds=0.0)
    schedule = schedule_of(trace, 3, rate=PAGE, num_held=1, num_spare=1)
    assert schedule.read_bytes == 9 * PAGE and schedule.written_bytes == 0
    assert schedule.step_s == pytest.approx(9.0)


def test_links_work_side_by_side_once_a_frame_is_spare() -> None:
    trace = trace_of([(page, True) for page in range(10)], seconds=0.0)
    one_by_one = schedule_of(trace, 2, rate=PAGE, num_held=1, num_spare=0)
    together = schedule_of(trace, 3, rate=PAGE, num_held=1, num_spare=1)
    assert one_by_one.step_s == pytest.approx(2 * 9.0)
    assert together.step_s == pytest.approx(10.0, rel=0.1)


def test_a_fetch_hides_behind_work() -> None:
    trace = trace_of([(page, False) for page in range(10)], seconds=1.0)
    assert schedule_of(trace, 3, rate=PAGE * 1.25, num_held=1).stall_s == pytest.approx(0)
    slow = schedule_of(trace, 3, rate=PAGE / 2, num_held=1)
    assert slow.step_s == pytest.approx(len(slow.orders) * 2.0, rel=0.1)
    assert slow.stall_s == pytest.approx(slow.step_s - 10.0)


def test_of_a_whole_step_in_half_the_memory() -> None:
    trace, scratch = model(6, 8)
    num_frames = len(trace.positions) // 2
    plain = schedule_of(trace, num_frames, rate=1e9)
    lean = schedule_of(trace, num_frames, rate=1e9, scratch=scratch)
    lru = schedule_of(trace, num_frames, rate=1e9, scratch=scratch, policy="lru")
    assert lean.read_bytes < plain.read_bytes and lean.step_s <= plain.step_s
    assert lean.step_s <= lru.step_s
    commits = schedule_of(trace, num_frames, rate=1e9, scratch=scratch, commits=True)
    assert commits.written_bytes >= (len(trace.positions) - len(scratch)) * PAGE
    whole = schedule_of(trace, len(trace.positions), rate=1e9)
    assert whole.orders == () and whole.step_s == pytest.approx(trace.step_s)
    assert obey(lean, 5, scratch=scratch, commits=False) == (lean.read_bytes, lean.written_bytes)


def test_zeros_take_their_frame_just_before_their_use() -> None:
    trace, scratch = model(6, 8)
    count = trace.num_positions
    half = len(trace.positions) // 2
    schedule = schedule_of(trace, half, rate=1e9, scratch=scratch, commits=True)
    first_use = {page: trace.positions[page][0] for page in scratch}
    zeros = [m for m in schedule.moves if m.needed_at % count == first_use.get(m.page)]
    assert zeros and not any(move.is_read for move in zeros)
    late = [m for m in zeros if m.needed_at - m.at == 1]
    assert len(late) > len(zeros) // 2
    for move in zeros:  # or before the page that leaves is fetched again, or is written for it
        fetched = [m.at - move.at for m in schedule.moves if m.page == move.evicts]
        again = min((ahead % count for ahead in fetched), default=count)
        assert move in late or move.is_dirty or again <= move.needed_at - move.at


@pytest.mark.parametrize(
    "uses, ends",
    [  # updates in the backward, after it, before the next forward, and a step late
        (["backward b", "update b", "backward a", "update a"], [1, 3]),
        (["backward b", "backward a", "update a", "update b"], [3]),
        (["update a", "update b", "backward b", "backward a"], [1]),
        (["update b", "backward b", "update a", "backward a"], []),
        (["update a", "backward a"], [0]),
        (["backward a", "update a", "update a"], [2]),
        (["backward b", "backward a"], [1]),
    ],
)
def test_sums_are_over_once_all_units_of_a_page_are_updated(uses: list[str], ends: list[int]):
    trace = synthetic_trace([(what, [0], True, 0.1) for what in uses])
    assert dead_gaps(trace, range(1)) == set(ends)
    assert dead_gaps(trace, ()) == set()


def guessed(num_units: int) -> tuple[Trace, range]:
    """Forward, then each unit's update in the backward: two pages of states and one of sums."""
    phases = [(f"forward {u}", [u], False, 1.0) for u in range(num_units)]
    sums = range(3 * num_units, 4 * num_units)
    for unit in reversed(range(num_units)):
        states = [num_units + 2 * unit, num_units + 2 * unit + 1]
        phases.append((f"backward {unit}", [unit], False, 2.0))
        phases.append((f"backward {unit}", [sums[unit]], True, 0.0))
        phases += [(f"update {unit}", [s, unit, sums[unit]], True, 0.1) for s in states]
    return synthetic_trace(phases), sums


@pytest.mark.parametrize("num_frames, stay", [(26, True), (12, False)])
def test_sums_of_a_guess_stay_to_the_end_where_they_fit(num_frames: int, stay: bool) -> None:
    trace, sums = guessed(8)
    schedule = schedule_of(trace, num_frames, scratch=sums, commits=True)
    last_use = {page: trace.positions[page][-1] for page in sums}
    early = [m for m in schedule.moves if m.evicts in sums and m.at >= last_use[m.evicts]]
    assert schedule.held == (set(sums) if stay else set())
    assert bool(early) != stay  # none leaves between its update and the end of the step
    count = trace.num_positions
    for page in sums:
        ahead = count if stay else count + trace.positions[page][0]
        assert schedule.next_use(page, last_use[page]) in {ahead, ahead + count}
    assert obey(schedule, 5, scratch=sums, commits=True)[0] == schedule.read_bytes


@pytest.mark.parametrize("num_frames", range(6, 34))
def test_every_access_of_a_guess_finds_its_page(num_frames: int) -> None:
    for units, spare in ((8, None), (8, 3), (3, 1), (1, 0)):
        trace, sums = guessed(units)
        most = min(num_frames, len(trace.positions))
        schedule = schedule_of(trace, most, scratch=sums, commits=True, num_spare=spare)
        assert obey(schedule, 5, scratch=sums, commits=True)[0] == schedule.read_bytes


def test_sums_stay_for_a_guess_alone() -> None:
    trace, sums = guessed(8)
    assert schedule_of(trace, 26, scratch=sums).held == set()
    late = [a for a in trace.accesses if a.what.startswith("update")]
    after = [a for a in trace.accesses if not a.what.startswith("update")] + late
    others = synthetic_trace([(a.what, [a.page], a.is_write, 0.1) for a in after])
    assert schedule_of(others, 26, scratch=sums, commits=True).held == set()


def test_next_use_that_follows_a_schedule_fetches_no_more() -> None:
    trace, _ = model(4, 4)
    schedule = schedule_of(trace, 60, num_held=1, num_spare=0)
    policy, frames, misses = NextUse(), set(schedule.resident), 0
    for page in frames:
        policy.touched(page, 0)
    policy.follow(schedule)
    for _ in range(5):
        misses = 0
        for position, access in enumerate(trace.accesses):
            if access.page not in frames:
                misses += 1
                frames.remove(policy.victim(frames, position))
                frames.add(access.page)
            policy.touched(access.page, position)
    assert misses <= len(schedule.orders)


def test_the_same_trace_gives_the_same_schedule() -> None:
    trace, scratch = model(4, 4)
    first, second = (
        schedule_of(trace, 60, rate=1e9, scratch=scratch, commits=True) for _ in range(2)
    )
    assert first == second and first.text() == second.text()


def test_frames_must_be_there() -> None:
    with pytest.raises(OutOfPages, match="num_frames=0: needs one frame"):
        schedule_of(trace_of([(0, False)]), 0)
    assert schedule_of(Trace((), 1.0), 1).step_s == 1.0


def stretched(trace: Trace, what: str, factor: float) -> Trace:
    """The trace with one section's work `factor` times as long."""
    now_s, accesses = 0.0, []
    for access, seconds in zip(trace.accesses, trace.work_s()):
        accesses.append(access._replace(at_s=now_s))
        now_s += seconds * (factor if access.what == what else 1.0)
    return Trace(tuple(accesses), now_s)


@pytest.mark.parametrize(
    "factor, is_off", [(1.0, False), (1.05, False), (0.95, False), (1.3, True), (0.7, True)]
)
def test_replan_when_a_unit_takes_another_share(factor: float, is_off: bool) -> None:
    trace, _ = model(4, 4)
    schedule = schedule_of(trace, 60)
    assert needs_replan(schedule, stretched(trace, "backward block 2", factor)) is is_off


@pytest.mark.parametrize("stall_s, is_off", [(0.0, False), (0.1, False), (0.5, True)])
def test_replan_when_the_step_waits_longer_than_planned(stall_s: float, is_off: bool) -> None:
    trace, _ = model(4, 4)
    measured = Trace(trace.accesses, trace.step_s, stall_s)
    assert needs_replan(schedule_of(trace, 60), measured) is is_off


def test_replan_when_the_step_uses_other_pages() -> None:
    trace, _ = model(4, 4)
    accesses = [*trace.accesses[1:], Access(3, trace.step_s, "forward block 0", False)]
    assert needs_replan(schedule_of(trace, 60), Trace(tuple(accesses), trace.step_s))


def test_the_table_adds_up() -> None:
    trace, scratch = model(3, 4)
    schedule = schedule_of(trace, 50, rate=1e9, scratch=scratch, commits=True)
    costs = schedule.costs()
    assert sum(c.num_accesses for c in costs) == len(trace.accesses)
    assert all(c.num_hits + c.num_fetches == c.num_accesses for c in costs)
    assert sum(c.num_fetches for c in costs) == len(schedule.orders)
    assert sum(c.read_bytes for c in costs) == schedule.read_bytes
    assert sum(c.written_bytes for c in costs) == schedule.written_bytes
    assert sum(c.stall_s for c in costs) == pytest.approx(schedule.stall_s)
    lines = schedule.text().splitlines()
    assert len(lines) == 2 + 1 + 1 + 9 + 1 + 1
    assert lines[4].split()[:3] == ["forward", "block", "0"]
    assert lines[-1].startswith("step")


def test_the_drawing_is_whole(tmp_path: Path) -> None:
    trace, scratch = model(3, 4)
    schedule_of(trace, 50, rate=1e9, scratch=scratch, commits=True).svg(tmp_path / "step.svg")
    text = (tmp_path / "step.svg").read_text()
    words = {e.text for e in ElementTree.fromstring(text).iter() if e.tag.endswith("}text")}
    assert {"compute", "read link", "write link", "frames", "weights", "states"} <= words
    schedule_of(Trace((), 0.0), 1).svg(tmp_path / "empty.svg")
    ElementTree.parse(tmp_path / "empty.svg")


def test_a_large_step_is_planned_in_seconds() -> None:
    trace, scratch = model(24, 20)
    began = time.perf_counter()
    schedule_of(trace, 2000, rate=1e9, scratch=scratch, num_spare=100)
    assert time.perf_counter() - began < 10
