"""Which pages stay in memory between two uses, and which frame each fetch takes.

A *gap* is the time between two uses of a page, round the circle of the step. A kept gap occupies a
frame from use to use; a dropped one only while the page is in hand, and costs a fetch. At no
position may kept gaps and pages in hand be more than the frames: that is the whole problem, and
as it is posed on the circle, its solution fits every step alike.

1. `kept_gaps`: Lru as it settles; or Belady's rule on one step whose first pages S are also its
   last. Belady run for ever would do slightly better, but each step would differ: over pages used
   once a step it keeps turning (A B C in two frames: 1.5 fetches a step, here 2). A page that is
   not carried over the end (not in S) is dropped at its last use; S loses what did not stay until
   it no longer changes. Each round costs no more fetches than the one before.
2. `pair`: frames become free in one order and are needed in another; each fetch takes the frame
   that has been free longest, so that it may start as early as memory allows, or just before its
   use where it reads nothing. A page that comes back before its frame was taken needs no fetch.

Pages of scratch (gradient sums) hold nothing from an update to the next backward, which lies over
the end of the step or within it, by when updates run. For that long they are never kept, leave
unwritten, and come back as zeros instead of read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable
from typing import NamedTuple

from ptm.engine.config import PolicyKind
from ptm.engine.eviction import Lru, NextUse
from ptm.engine.scratch import dead_gaps, sums_of_guess, with_end
from ptm.engine.trace import Trace


class Move(NamedTuple):
    """A fetch and the eviction that frees its frame. `at` is in the step, `needed_at` after it:
    from num_positions on it means the next step. `last_use` is of the page that leaves; `is_dirty`
    when it has to be written; `is_read` unless the page that comes is zeros."""

    at: int
    page: int
    needed_at: int
    evicts: int
    last_use: int
    is_dirty: bool
    is_read: bool


class Flush(NamedTuple):
    """A page that a commit takes, and the position of its last change in the step, after which it
    is written. It may not be changed and cannot leave before that is done; `needed_at` is when one
    of the two comes up, from num_positions on in the next step."""

    page: int
    at: int
    needed_at: int


def moves_of(
    trace: Trace,
    *,
    policy: PolicyKind,
    num_frames: int,
    num_spare: int,
    num_held: int,
    scratch: Container[int],
    commits: bool,
) -> tuple[list[Move], list[Flush], list[int]]:
    """`kept_gaps` with what is not spare, then `pair`; and the pages whose sums stay to the end."""

    capacity, hold = num_frames - num_spare, num_held - 1
    sums = sums_of_guess(trace, scratch) if commits else []
    for held in (sums, []) if sums else ([],):
        planned = with_end(trace, held)
        kept = kept_gaps(
            planned, policy=policy, capacity=capacity, num_held=num_held, scratch=scratch
        )
        if not all(kept[trace.positions[page][-1]] for page in held):
            continue
        moves, flushes = pair(
            planned,
            kept,
            num_frames=num_frames,
            num_held=num_held,
            scratch=scratch,
            commits=commits,
        )
        if (found := _without_end(moves, trace, len(held), hold)) is not None:
            return found, [_flush_without(flush, trace, len(held)) for flush in flushes], held
    raise AssertionError("a plan without sums to the end always stands")


def _without_end(moves: list[Move], trace: Trace, more: int, hold: int) -> list[Move] | None:
    """Positions of the trace for those of one that is longer by `more` uses at the end: what comes
    after these comes in the next step. None where that is too late for its need."""
    count, found = trace.num_positions, []
    for move in moves:
        at, needed = move.at, move.needed_at
        needed -= more if needed >= count else 0
        last = move.last_use if move.last_use < count else trace.positions[move.evicts][-1]
        if at >= count:  # what was in hand at the end still is
            at, needed = max(0, last + hold - count), needed - count
            if needed <= at:
                return None
        found.append(move._replace(at=at, needed_at=needed, last_use=last))
    return sorted(found, key=lambda move: (move.at, move.needed_at - move.at))


def _flush_without(flush: Flush, trace: Trace, more: int) -> Flush:
    is_next = flush.needed_at >= trace.num_positions
    return flush._replace(needed_at=flush.needed_at - (more if is_next else 0))


def kept_gaps(
    trace: Trace,
    *,
    policy: PolicyKind,
    capacity: int,
    num_held: int,
    scratch: Container[int] = (),
) -> list[bool]:
    """For each access, whether its page stays in one of `capacity` frames until its next use.

    The latest `num_held` accesses may be in hand at once and are never sent away.
    """
    count, following = trace.num_positions, trace.following
    dead = dead_gaps(trace, scratch)
    hands = _Hands(capacity, num_held, dead)
    lru = _Pass(trace, Lru(), hands)
    # After one step the frames hold the pages used last; from then on every step is alike.
    lru.run()
    hits = lru.run()
    if policy is PolicyKind.next_use:
        endless = _Pass(trace, NextUse(), hands)
        endless.follow(trace, ())
        for _ in range(2):
            endless.run()
        hits = max((_belady(trace, p.frames, hands) for p in (endless, lru)), key=sum)
    return [
        hits[there % count] and (here not in dead or there - here < num_held)
        for here, there in enumerate(following)
    ]


def _belady(trace: Trace, frames: set[int], hands: _Hands) -> list[bool]:
    carried = {page for page in frames if trace.positions[page][-1] not in hands.dead}
    while True:
        walk = _Pass(trace, NextUse(), hands)
        walk.follow(_Carried(trace, carried), carried)
        hits = walk.run()
        stayed = {p for p in carried if p in walk.frames and hits[trace.positions[p][0]]}
        if stayed == carried:
            return hits
        carried = stayed


class _Hands(NamedTuple):
    capacity: int
    num_held: int
    dead: set[int]


class _Carried(NamedTuple):
    """The trace for Belady's rule when only `pages` are kept over the end of the step."""

    trace: Trace
    pages: set[int]

    @property
    def num_positions(self) -> int:
        return self.trace.num_positions

    def next_use(self, page: int, position: int) -> int:
        use, count = self.trace.next_use(page, position), self.trace.num_positions
        return use if use < count or page in self.pages else use + count


class _Pass:
    """Steps through the trace with a policy, fetching on demand."""

    def __init__(self, trace: Trace, policy: Lru | NextUse, hands: _Hands) -> None:
        self.trace, self.policy, self.capacity = trace, policy, hands.capacity
        self.dead = hands.dead
        self.frames: set[int] = set()
        self.over: dict[int, None] = {}
        "Pages of scratch in frames that hold nothing."
        self.in_hand: deque[int] = deque(maxlen=hands.num_held - 1)

    def follow(self, uses: Trace | _Carried, carried: Iterable[int]) -> None:
        """Begin with `carried` and what was in hand at the end of the step before."""
        last = {page: used[-1] for page, used in self.trace.positions.items()}
        self.policy.follow(uses)
        pages = set(carried)
        if pages and self.in_hand.maxlen:
            self.in_hand.extend(a.page for a in self.trace.accesses[-self.in_hand.maxlen :])
        self.frames = pages.union(self.in_hand)
        for page in sorted(self.frames, key=last.__getitem__):
            self.policy.touched(page, last[page])

    def run(self) -> list[bool]:
        """One step: whether each access found its page."""
        hits = []
        for position, access in enumerate(self.trace.accesses):
            page = access.page
            hits.append(page in self.frames)
            if not hits[-1]:
                self._make_room(position)
                self.frames.add(page)
            self.over.pop(page, None)
            if position in self.dead:
                self.over[page] = None
            self.policy.touched(page, position)
            self.in_hand.append(page)
        return hits

    def _make_room(self, position: int) -> None:
        if len(self.frames) < self.capacity:
            return
        for page in self.over:
            if page not in self.in_hand:
                del self.over[page]
                self.frames.remove(page)
                return
        held = [page for page in set(self.in_hand) if page in self.frames]
        self.frames.difference_update(held)
        self.frames.remove(self.policy.victim(self.frames, position))
        self.frames.update(held)


def pair(
    trace: Trace,
    kept: list[bool],
    *,
    num_frames: int,
    num_held: int,
    scratch: Container[int] = (),
    commits: bool = False,
) -> tuple[list[Move], list[Flush]]:
    """A fetch for every dropped gap that needs one, in the order in which they are issued, and,
    if a commit follows every step, what it has to write."""
    count, hold = trace.num_positions, num_held - 1
    gaps = [position for position, stays in enumerate(kept) if not stays]
    # Frame number k of the circle is freed by gap k, at gaps[k % M] + hold; needs likewise.
    needs = sorted(trace.following[gap] % count for gap in gaps)
    rank = {need: index for index, need in enumerate(needs)}
    wanted = [
        rank[trace.following[gap] % count] + len(gaps) * (trace.following[gap] // count)
        for gap in gaps
    ]
    # Just before position 0: frames of kept gaps and in hand; the rest wait, freed one by one.
    over_end = sum(stays and there >= count for stays, there in zip(kept, trace.following))
    freed = sum(gap + hold < count for gap in gaps)
    waiting = num_frames - over_end - (len(gaps) - freed)
    taker = [index - (freed - len(gaps) - waiting) for index in range(len(gaps))]
    _rescue(taker, wanted)
    dropped = {gap for gap, take, want in zip(gaps, taker, wanted) if take != want}
    dead = dead_gaps(trace, scratch)
    dirty, flushes = _dirty(trace, dropped, scratch, dead, commits)
    zeros = {trace.following[position] % count for position in dead}
    return _moves(trace, gaps, taker, wanted, hold, dirty, zeros), flushes


def _rescue(taker: list[int], wanted: list[int]) -> None:
    """Give a page its own frame where nobody takes it before the page is needed again, and the
    frame that it would have had, which has been free for longer, to whoever was to take it."""
    size = len(taker)
    source = {take % size: free - (take - take % size) for free, take in enumerate(taker)}
    todo = list(range(size))
    while todo:
        free = todo.pop()
        take, want = taker[free], wanted[free]
        if take <= want:
            continue
        turns = want // size
        other = source[want % size] + turns * size
        taker[free], source[want % size] = want, free - turns * size
        if other % size == free:
            continue  # the frame would have waited for more than a step: one frame too many
        turns = other // size
        taker[other % size] = take - turns * size
        source[take % size] = other - (take - take % size)
        todo.append(other % size)


def _moves(
    trace: Trace,
    gaps: list[int],
    taker: list[int],
    wanted: list[int],
    hold: int,
    dirty: set[int],
    zeros: set[int],
) -> list[Move]:
    """dirty: last uses of pages to be written when they leave. zeros: uses of pages that come as
    zeros."""
    count, size = trace.num_positions, len(gaps)
    is_fetched = [take != want for take, want in zip(taker, wanted)]
    moves: dict[int, Move] = {}
    before: dict[int, int] = {}
    page_at = {wanted[k] % size: k for k in range(size)}
    for free, gap in enumerate(gaps):
        if not is_fetched[free]:
            continue
        # 1. The fetch `take` uses the frame that `gap` leaves; count it from its own step.
        fetch, turns = taker[free] % size, taker[free] // size
        incoming = page_at[fetch]
        need = trace.following[gaps[incoming]] % count
        at = gap + hold - turns * count
        page, evicts = trace.accesses[need].page, trace.accesses[gap].page
        moves[fetch] = Move(at, page, need, evicts, gap, gap in dirty, need not in zeros)
        assert need - count < at < need, ("a frame is free too late", at, need)
        # 2. The page that comes in left earlier, with the fetch `taker[incoming]`.
        before[fetch] = taker[incoming] - (wanted[incoming] - fetch)
    _after_own_eviction(moves, before, size, count)
    _zeros_late(moves, before, size, count)
    ordered = sorted(moves.values(), key=lambda move: (move.at % count, move.needed_at - move.at))
    steps = [move.at // count * count for move in ordered]
    return [m._replace(at=m.at - s, needed_at=m.needed_at - s) for m, s in zip(ordered, steps)]


def _after_own_eviction(
    moves: dict[int, Move], before: dict[int, int], size: int, count: int
) -> None:
    # Pairing in order gives this by itself; only a rescue can turn two fetches round.
    is_moved = True
    while is_moved:
        is_moved = False
        for fetch, move in moves.items():
            earlier = moves[before[fetch] % size].at + before[fetch] // size * count
            if earlier > move.at:
                moves[fetch], is_moved = move._replace(at=earlier), True


def _zeros_late(moves: dict[int, Move], before: dict[int, int], size: int, count: int) -> None:
    """Zeros need not come early: before its use, a page of scratch may still hold what the step
    before left there, which would be read. So they take their frame just before."""
    returns = {left % size: (fetch, left // size * count) for fetch, left in before.items()}
    is_moved = True
    while is_moved:
        is_moved = False
        for index, move in moves.items():
            fetch, turns = returns[index]
            latest = min(move.needed_at - 1, moves[fetch].at - turns)
            if latest > move.at and not move.is_read and not move.is_dirty:
                moves[index], is_moved = move._replace(at=latest), True


def _dirty(
    trace: Trace, dropped: set[int], scratch: Container[int], dead: set[int], commits: bool
) -> tuple[set[int], list[Flush]]:
    """Dropped gaps whose page was changed since it was fetched or written for the commit; and what
    is written for that."""
    found, flushes, count = set[int](), list[Flush](), trace.num_positions
    for page, used in trace.positions.items():
        ends = [index for index, position in enumerate(used) if position in dropped]
        begin = ends[-1] + 1 if ends else 0
        is_dirty = False
        writes = [position for position in used if trace.accesses[position].is_write]
        last = writes[-1] if commits and writes and page not in scratch else None
        if last is not None:
            ahead = [p + (0 if p > last else count) for p in {*writes, *(dropped & set(used))}]
            flushes.append(Flush(page, last, last if last in dropped else min(ahead)))
        for index in [*range(begin, len(used)), *range(begin)]:
            position = used[index]
            is_dirty = is_dirty or trace.accesses[position].is_write
            if position == last or position in dead:
                is_dirty = False
            if position in dropped:
                found.update([position] if is_dirty else [])
                is_dirty = False
    return found, flushes
