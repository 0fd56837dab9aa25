"""When everything in a schedule happens: compute, the read link and the write link, event by event.

Each link carries one page at a time at its rate, the two do not disturb each other. A fetch is
issued after the access at its `at`; a dirty page is written before its frame is read into, and
before it is read again. What a commit takes is written after its last change. Of the requests that
can start, the one needed first goes first. Compute waits at an access whose page is not there, and
before it changes a page that is still to be written. The run starts as if the step before had
brought everything in time; the third of four steps is measured, when queues have settled.

It does not model: several requests in flight on one link, access times.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from ptm.engine.residency import Flush, Move
from ptm.engine.trace import Trace

_STEPS, _MEASURED = 4, 2


class Transfer(NamedTuple):
    """One page on a link, in seconds of the step; what began in the step before is below 0."""

    page: int
    start_s: float
    end_s: float


class Timeline(NamedTuple):
    """One step. `at_s` is when each access gets its page, `waited_s` how long it waited before;
    `reads` and `writes` belong to the moves, in their order (None: nothing to move); `commits`
    to the pages of the commit."""

    step_s: float
    at_s: list[float]
    waited_s: list[float]
    reads: list[Transfer | None]
    writes: list[Transfer | None]
    commits: list[Transfer]


class _Job(NamedTuple):
    # Ordered by need; `step` and `move` name one issue of one move, or of one page of the commit.
    needed_at: int
    step: int
    move: int
    is_commit: bool
    is_write: bool


def simulate(
    trace: Trace,
    moves: Sequence[Move],
    flushes: Sequence[Flush] = (),
    *,
    read_page_s: float,
    write_page_s: float,
) -> Timeline:
    """Play `moves` over `trace` with links that take that long for a page."""
    return _Play(trace, moves, flushes, read_page_s, write_page_s).run()


class _Play:
    def __init__(
        self,
        trace: Trace,
        moves: Sequence[Move],
        flushes: Sequence[Flush],
        read_page_s: float,
        write_page_s: float,
    ) -> None:
        self.trace, self.moves, self.flushes = trace, moves, flushes
        self.page_s = {True: write_page_s, False: read_page_s}
        self.count = trace.num_positions
        self.issued_at: dict[int, list[int]] = {}
        for index, move in enumerate(moves):
            self.issued_at.setdefault(move.at, []).append(index)
        self.flushed_at: dict[int, list[int]] = {}
        for index, flush in enumerate(flushes):
            self.flushed_at.setdefault(flush.at, []).append(index)
        # Accesses that wait for a fetch; those of the first step have theirs from before.
        self.awaited = {move.needed_at % self.count for move in moves}
        self.arrived = {move.needed_at - self.count for move in moves}
        self.queues: dict[bool, list[_Job]] = {True: [], False: []}
        self.is_busy = {True: False, False: False}
        # Pages that are to be written, and fetches that wait until one of them is.
        self.leaving: set[int] = set()
        self.behind: dict[int, list[_Job]] = {}
        self.spans: dict[_Job, tuple[float, float]] = {}
        self.got_s: list[float] = []
        self.waited_s: list[float] = []
        # (seconds, 0 for transfers and 1 for compute, number, job or None)
        self.events: list[tuple[float, int, int, _Job | None]] = []
        self.blocked_s: float | None = None

    def run(self) -> Timeline:
        if not self.count:
            return Timeline(self.trace.step_s, [], [], [], [], [])
        total = _STEPS * self.count
        self._push(self.trace.accesses[0].at_s, None)
        while self.events and len(self.got_s) < total:
            now, _, _, job = heapq.heappop(self.events)
            if job is not None:
                self._finish(job, now)
            elif self._is_there(len(self.got_s)):
                self._access(now, now)
            else:
                self.blocked_s = now
            if self.blocked_s is not None and self._is_there(len(self.got_s)):
                asked, self.blocked_s = self.blocked_s, None
                self._access(asked, now)
        return self._measured()

    def _is_there(self, position: int) -> bool:
        at = position % self.count
        if at in self.awaited and position not in self.arrived:
            return False
        access = self.trace.accesses[at]
        return not (access.is_write and access.page in self.leaving)

    def _access(self, asked: float, now: float) -> None:
        position = len(self.got_s)
        self.got_s.append(now)
        self.waited_s.append(now - asked)
        step, at = divmod(position, self.count)
        for index in self.flushed_at.get(at, ()):
            flush = self.flushes[index]
            self.leaving.add(flush.page)
            needed = flush.needed_at + step * self.count
            self._enqueue(_Job(needed, step, index, True, True), now)
        for index in self.issued_at.get(at, ()):
            move = self.moves[index]
            fetch = _Job(move.needed_at + step * self.count, step, index, False, False)
            if move.is_dirty:
                self.leaving.add(move.evicts)
                self._enqueue(fetch._replace(is_write=True), now)
            self._fetch(fetch, now)
        here, last = self.trace.accesses[at].at_s, at + 1 == self.count
        if last:
            after = self.trace.step_s - here + self.trace.accesses[0].at_s
        else:
            after = self.trace.accesses[at + 1].at_s - here
        self._push(now + after, None)

    def _fetch(self, job: _Job, now: float) -> None:
        """Start it as soon as its frame is free and what its page was is on the disk."""
        move = self.moves[job.move]
        for page in (move.evicts, move.page):
            if page in self.leaving:
                self.behind.setdefault(page, []).append(job)
                return
        if move.is_read:
            self._enqueue(job, now)
        else:
            self.arrived.add(job.needed_at)

    def _enqueue(self, job: _Job, now: float) -> None:
        heapq.heappush(self.queues[job.is_write], job)
        self._start(job.is_write, now)

    def _start(self, is_write: bool, now: float) -> None:
        if self.queues[is_write] and not self.is_busy[is_write]:
            job = heapq.heappop(self.queues[is_write])
            self.is_busy[is_write] = True
            self.spans[job] = (now, now + self.page_s[is_write])
            self._push(now + self.page_s[is_write], job)

    def _finish(self, job: _Job, now: float) -> None:
        self.is_busy[job.is_write] = False
        if job.is_write:
            page = self.flushes[job.move].page if job.is_commit else self.moves[job.move].evicts
            self.leaving.discard(page)
            for waiting in self.behind.pop(page, ()):
                self._fetch(waiting, now)
        else:
            self.arrived.add(job.needed_at)
        self._start(job.is_write, now)

    def _push(self, at_s: float, job: _Job | None) -> None:
        number = job.needed_at if job else 0
        heapq.heappush(self.events, (at_s, int(job is None), number, job))

    def _measured(self) -> Timeline:
        first, next_first = _MEASURED * self.count, (_MEASURED + 1) * self.count
        lead_s = self.trace.accesses[0].at_s
        begin = self.got_s[first] - self.waited_s[first] - lead_s
        end = self.got_s[next_first] - self.waited_s[next_first] - lead_s

        def transfer(page: int, job: _Job) -> Transfer | None:
            if job not in self.spans:
                return None
            start, stop = self.spans[job]
            return Transfer(page, start - begin, stop - begin)

        reads, writes = [], []
        for index, move in enumerate(self.moves):
            # The issue whose need falls into the measured step.
            step = _MEASURED - move.needed_at // self.count
            fetch = _Job(move.needed_at + step * self.count, step, index, False, False)
            reads.append(transfer(move.page, fetch))
            writes.append(transfer(move.evicts, fetch._replace(is_write=True)))
        commits = []
        for index, flush in enumerate(self.flushes):
            needed = flush.needed_at + _MEASURED * self.count
            commits.append(transfer(flush.page, _Job(needed, _MEASURED, index, True, True)))
        return Timeline(
            end - begin,
            [at - begin for at in self.got_s[first:next_first]],
            self.waited_s[first:next_first],
            reads,
            writes,
            [commit for commit in commits if commit],
        )
