"""Policies against exhaustive search on small traces, and what they do without a future."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.engine.config import PolicyKind
from ptm.engine.eviction import POLICIES, EvictionPolicy, Lru, NextUse
from ptm.engine.trace import Access, Trace

pages_of_a_step = st.lists(st.integers(0, 4), min_size=1, max_size=9)


def trace_of(pages: Sequence[int]) -> Trace:
    return Trace(tuple(Access(p, float(i), "forward a", False) for i, p in enumerate(pages)), 1e3)


def misses(policy: EvictionPolicy, pages: Sequence[int], num_frames: int, steps: int) -> int:
    """Fetches on demand over so many steps, from empty frames."""
    frames: set[int] = set()
    count = 0
    for _ in range(steps):
        for position, page in enumerate(pages):
            if page not in frames:
                count += 1
                if len(frames) == num_frames:
                    victim = policy.victim(frames, position)
                    assert victim in frames
                    frames.remove(victim)
                frames.add(page)
            policy.touched(page, position)
    return count


def least_misses(pages: Sequence[int], num_frames: int, steps: int) -> int:
    """Every choice tried, by dynamic programming over what the frames hold."""
    costs = {frozenset[int](): 0}
    for page in itertools.chain.from_iterable([pages] * steps):
        reached: dict[frozenset[int], int] = {}
        for frames, cost in costs.items():
            if page in frames:
                options = [(frames, cost)]
            elif len(frames) < num_frames:
                options = [(frames | {page}, cost + 1)]
            else:
                options = [((frames - {out}) | {page}, cost + 1) for out in frames]
            for option, price in options:
                reached[option] = min(price, reached.get(option, price))
        costs = reached
    return min(costs.values())


@given(pages_of_a_step, st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_next_use_has_the_fewest_misses(pages: list[int], num_frames: int, steps: int) -> None:
    policy = NextUse()
    policy.follow(trace_of(pages))
    found = misses(policy, pages, num_frames, steps)
    assert found == least_misses(pages, num_frames, steps)
    assert found <= misses(Lru(), pages, num_frames, steps)


@given(pages_of_a_step, st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_next_use_without_a_trace_is_lru(pages: list[int], num_frames: int, steps: int) -> None:
    assert misses(NextUse(), pages, num_frames, steps) == misses(Lru(), pages, num_frames, steps)


def test_lru_sends_away_the_oldest_of_the_candidates() -> None:
    policy = Lru()
    for position, page in enumerate([3, 1, 2, 3]):
        policy.touched(page, position)
    assert policy.victim({1, 2, 3}, 4) == 1
    assert policy.victim([3, 2], 4) == 2
    assert policy.victim(iter([9, 8]), 4) == 8


def test_next_use_passes_over_held_pages_and_finds_them_again() -> None:
    policy = NextUse()
    policy.follow(trace_of([0, 1, 2, 3]))
    for page in range(4):
        policy.touched(page, page)
    assert policy.victim({0, 1, 2}, 3) == 2
    assert policy.victim({0, 1}, 3) == 1
    assert policy.victim({0, 3}, 3) == 3


def test_next_use_knows_what_was_in_the_frames_before_the_trace() -> None:
    policy = NextUse()
    for position, page in enumerate([0, 1, 2]):
        policy.touched(page, position)
    policy.follow(trace_of([0, 1, 2]))
    assert policy.victim({0, 1, 2}, 0) == 2


def test_memory_stays_bounded_where_nothing_is_evicted() -> None:
    policy = NextUse()
    policy.follow(trace_of([0, 1, 2]))
    for _ in range(1000):
        for position in range(3):
            policy.touched(position, position)
    assert len(policy._farthest) <= 4 * 3 + 64


@pytest.mark.parametrize("kind", list(PolicyKind))
def test_nothing_to_evict_is_said(kind: PolicyKind) -> None:
    with pytest.raises(AssertionError, match="all are held"):
        POLICIES[kind]().victim(set(), 0)
