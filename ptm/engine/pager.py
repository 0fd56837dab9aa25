"""Which page lies in which frame, and the moves between frames and the page file.

    absent --fetch--> fetching --> ready --write back--> ready, clean
       ^                             |                      |
       +-------- its frame goes to another page <-----------+   only while nobody holds it

A clean page leaves at no cost. A dirty one is written first: it is marked `leaving`, and its frame
is free once the write is done; a hold in between takes the mark away and the page stays, so that
nothing is read again. Reading a page while it is written is fine; who wants to write it waits.
What a commit takes is written back in the same way, without the mark, a few pages at a time, so
that fetches find their way between.

A page whose two slots are both named by records (commit.py) cannot be written: it is `parked`, no
candidate for eviction, until the commit in progress is done.

All methods expect `lock` to be taken, except the ones that do I/O, which say so. `changed` is
notified whenever a page or frame comes free or arrives.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from ptm.common.errors import OutOfPages, line
from ptm.common.units import format_bytes
from ptm.engine.commit import Slots
from ptm.engine.record import NO_SLOT
from ptm.engine.tier import Frames, SsdTier

ABSENT, FETCHING, READY = 0, 1, 2
GRACE_S, STUCK_S = 0.5, 600.0
"""A wait for a frame is an error after so long without any page coming or going: when all frames
are held by threads that wait themselves, and when that cannot be told."""


class Policy(Protocol):
    def touched(self, page: int, position: int) -> None: ...
    def victim(self, candidates: Iterable[int], position: int) -> int: ...


class Pager:
    def __init__(
        self, *, frames: Frames, slots: Slots, ssd: SsdTier | None, policy: Policy, num_pages: int
    ) -> None:
        self.frames, self.slots, self.ssd, self.policy = frames, slots, ssd, policy
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.state = bytearray(num_pages)
        self.frame = [-1] * num_pages
        self.holds = [0] * num_pages
        self.holders: dict[int, int] = {}
        "Holds of each thread, to tell a wait that cannot end."
        self.writers: dict[int, int] = {}
        self.dirty: set[int] = set()
        self.writing: set[int] = set()
        self.leaving: set[int] = set()
        self.parked: set[int] = set()
        self.unflushed: set[int] = set()
        "Pages of the commit in progress that are not written yet."
        self.idle: dict[int, None] = {}
        "Pages that may leave: ready, not held, not being written; a dict keeps their order."
        self.fresh: set[int] = set()
        "Asked for ahead and not held since: no prefetch may evict them."
        self.free = list(range(frames.num_frames - 1, -1, -1))
        self.wants: deque[int] = deque()
        "Prefetches that wait for a leaving page's frame."
        self.soon: deque[int] = deque()
        "To be written for a commit, as soon as fewer than `most_writing` are."
        self.most_writing = max(1, ssd.threads.num_threads - 1) if ssd is not None else 0
        self.queued: set[int] = set()
        "Pages being fetched ahead of need of which the read has not begun."
        self.num_fetching = 0
        self.waiting: dict[int, int] = {}
        "Threads that wait for a frame, and for which page."
        self.num_given_up = 0
        "Prefetches that found no frame."
        self.given_up: set[int] = set()
        "Their pages, since the schedule was told."
        self.position = 0
        "Of the last access in the step that the schedule knows."
        self.failure: BaseException | None = None
        self.is_told = False
        self.describe: Callable[[int], str] | None = None

    def check(self) -> None:
        """Raise what a background read, write or commit has run into."""
        if self.failure is not None:
            self.is_told = True
            raise self.failure

    def fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
        self.changed.notify_all()

    def frame_for(self, page: int) -> int | None:
        """A frame for an absent page, now fetching; None when another thread fetches it meanwhile.

        Waits, without the lock, until a frame is free. Raises OutOfPages when that cannot happen.
        """
        me = threading.get_ident()
        self.waiting[me] = page
        try:
            while self.state[page] == ABSENT:
                self.check()
                frame = self.free.pop() if self.free else None
                if frame is None and self.idle and len(self.leaving) < len(self.waiting):
                    victim = self.policy.victim(self.idle.keys(), self.position)
                    frame = self.evict(victim, urgent=True)
                if frame is not None:
                    self._begin_fetch(page, frame)
                    return frame
                # Twice, as a thread may just be releasing what another held.
                was_stuck = self._is_stuck()
                waited_s = GRACE_S if was_stuck else None if self.parked else STUCK_S
                in_vain = not self.changed.wait(waited_s)
                if in_vain and (not was_stuck or self._is_stuck()):
                    raise OutOfPages(self.table(page))
            return None
        finally:
            del self.waiting[me]

    def _is_stuck(self) -> bool:
        """Is every frame held by threads that wait for a frame themselves?"""
        if self.idle or self.leaving or self.writing or self.parked or self.num_fetching:
            return False
        counts = self.holders
        if any(count < 0 for count in counts.values()):
            return False  # released by another thread than the one that held: no telling
        return sum(self.holds) == sum(counts.get(thread, 0) for thread in self.waiting)

    def _begin_fetch(self, page: int, frame: int) -> None:
        self.state[page] = FETCHING
        self.frame[page] = frame
        self.num_fetching += 1

    def load(self, page: int, *, ahead: bool) -> None:
        """Bring a fetching page in. Takes the lock itself. Raises StorageError, CheckpointError."""
        frame, slot = self.frame[page], self.slots.now[page]
        try:
            if slot == NO_SLOT:
                self.frames.tensors[frame].zero_()
            else:
                assert self.ssd is not None
                digest = self.slots.sums[page]
                self.ssd.read(page, slot, self.frames.views[frame], digest)
        except BaseException as error:
            with self.lock:
                self.num_fetching -= 1
                self.state[page] = ABSENT
                self._freed(self._drop(page))
                self.fail(error)
                self.is_told |= self.failure is error and not ahead
            raise
        with self.lock:
            self.num_fetching -= 1
            self.state[page] = READY
            if ahead:
                self.fresh.add(page)
                self.idle[page] = None
            self.changed.notify_all()

    def _load_ahead(self, page: int) -> None:
        with self.lock:
            if not self.take_over(page):
                return  # somebody could not wait, and reads it in the own thread
        with contextlib.suppress(BaseException):  # kept for the next who asks
            self.load(page, ahead=True)

    def take_over(self, page: int) -> bool:
        """Is `page` still to be read? Then the caller has to `load` it, and nobody else will."""
        was_queued = page in self.queued
        self.queued.discard(page)
        return was_queued

    def prefetch(self, page: int, *, evicts: int | None, may_evict: Callable[[int], bool]) -> bool:
        """Start to fetch `page` if that is possible without waiting for anybody who holds a page.

        Takes a free frame; or the frame of `evicts`, once that is released; or, if that is gone,
        the frame of a page that the policy names and `may_evict` allows. Demand goes first: nothing
        happens while a thread waits for a frame.
        Returns whether the page is there or on its way.
        """
        self.stay(page)
        if self.state[page] == READY and not self.holds[page]:
            self.fresh.add(page)
        if self.state[page] != ABSENT or self.ssd is None or self.failure is not None:
            return True
        if self.free:
            self._fetch_ahead(page, self.free.pop())
            return True
        victim = evicts
        if evicts is not None and evicts in self.writing and not self.holds[evicts]:
            self.leaving.add(evicts)
            self.wants.append(page)
            return True
        if self.waiting or not self.idle or (evicts is not None and self.holds[evicts]):
            victim = None
        elif victim not in self.idle:
            victim = self.policy.victim(self.idle.keys(), self.position)
            victim = victim if victim not in self.fresh and may_evict(victim) else None
        if victim is None:
            return False
        frame = self.evict(victim)
        if frame is None:
            self.wants.append(page)
        else:
            self._fetch_ahead(page, frame)
        return True

    def _fetch_ahead(self, page: int, frame: int) -> None:
        assert self.ssd is not None
        self._begin_fetch(page, frame)
        self.queued.add(page)
        self.ssd.threads.submit(self._load_ahead, page)

    def evict(self, page: int, *, urgent: bool = False) -> int | None:
        """Send an idle page down: its frame if it is clean, None if it has to be written first."""
        assert page in self.idle, f"page {page} cannot be evicted now"
        if page in self.dirty:
            self.leaving.add(page)
            self.write_back(page, urgent=urgent)
            return None
        del self.idle[page]
        return self._drop(page)

    def _drop(self, page: int) -> int:
        frame = self.frame[page]
        self.state[page] = ABSENT
        self.frame[page] = -1
        self.fresh.discard(page)
        return frame

    def _freed(self, frame: int) -> None:
        """Give a frame to the next prefetch that waits for one, if no thread does."""
        while self.wants and not self.waiting:
            page = self.wants.popleft()
            if self.state[page] == ABSENT:
                self._fetch_ahead(page, frame)
                break
        else:
            self.free.append(frame)
        self._give_up_wants()

    def write_soon(self, pages: Iterable[int]) -> None:
        """Write dirty durable pages, in this order, that will not change before the next commit."""
        self.soon.extend(pages)
        while self.soon and len(self.writing) < self.most_writing and self.failure is None:
            page = self.soon.popleft()
            if page not in self.dirty or page in self.writing or page in self.writers:
                continue
            if self.slots.target(page) is not None:
                self.write_back(page)

    def write_back(self, page: int, *, urgent: bool = False) -> None:
        """Start to write a dirty page that nobody writes to."""
        slot = self.slots.target(page)
        assert self.ssd is not None and slot is not None, f"page {page} has no slot to go to"
        self.writing.add(page)
        self.idle.pop(page, None)
        self.ssd.threads.submit(self._write, page, slot, urgent=urgent)

    def _write(self, page: int, slot: int) -> None:
        assert self.ssd is not None
        try:
            digest = self.ssd.write(page, slot, self.frames.views[self.frame[page]])
        except BaseException as error:
            with self.lock:
                self.writing.discard(page)
                self.leaving.discard(page)
                self.fail(error)
            return
        with self.lock:
            self.slots.wrote(page, slot, digest, in_commit=page in self.unflushed)
            self.unflushed.discard(page)
            self.writing.discard(page)
            self.dirty.discard(page)
            if page in self.leaving:
                self.leaving.discard(page)
                self._freed(self._drop(page))
            elif not self.holds[page]:
                self.settle(page)
            self.write_soon(())
            self.changed.notify_all()

    def stay(self, page: int) -> None:
        """A page that may be leaving is wanted again: it stays, and is clean once written."""
        if page in self.leaving:
            self.leaving.discard(page)
            self._give_up_wants()

    def _give_up_wants(self) -> None:
        if not self.leaving:
            self.num_given_up += len(self.wants)
            self.given_up.update(self.wants)
            self.wants.clear()

    def keep(self, page: int) -> None:
        """Take a page that is now held off every list of pages that may leave."""
        self.idle.pop(page, None)
        if self.leaving:
            self.stay(page)
        if self.parked:
            self.parked.discard(page)
        if self.fresh:
            self.fresh.discard(page)

    def settle(self, page: int) -> None:
        """Put a page that nobody holds any more where it belongs."""
        if page in self.writing:
            return
        if page in self.dirty and self.ssd is not None and self.slots.target(page) is None:
            self.parked.add(page)
        else:
            self.idle[page] = None
        if self.waiting:
            self.changed.notify_all()

    def unpark(self) -> None:
        """A commit is done: slots of the one before are free again."""
        self.idle.update(dict.fromkeys(self.parked))
        self.parked.clear()
        self.changed.notify_all()

    def discard(self, pages: Iterable[int]) -> None:
        """Forget what idle pages hold; they are zeros at their next hold."""
        for page in pages:
            while page in self.writing or self.state[page] == FETCHING:
                self.check()
                self.changed.wait()
            assert not self.holds[page], f"page {page} is held"
            self.dirty.discard(page)
            self.slots.forget(page)
            if self.state[page] == READY:
                self.idle.pop(page, None)
                self._freed(self._drop(page))
        self.changed.notify_all()

    def undo(self) -> None:
        """Make durable pages what the last commit has, once none is on its way."""
        self.wants.clear()
        self.soon.clear()
        while self.writing or self.num_fetching:
            self.check()
            self.changed.wait()
        written = {page for page in self.dirty if page in self.slots.durable}
        for page in written.union(self.slots.undo()):
            assert not self.holds[page], f"page {page} is held"
            self.dirty.discard(page)
            self.parked.discard(page)
            self.idle.pop(page, None)
            if self.state[page] == READY:
                self._freed(self._drop(page))
        self.changed.notify_all()

    def reset(self) -> None:
        """Drop all pages, written or not, once none is on its way. None may be held."""
        self.wants.clear()
        self.soon.clear()
        while self.writing or self.num_fetching:
            self.check()
            self.changed.wait()
        assert not any(self.holds), "pages are held"
        for page in range(len(self.state)):
            if self.state[page] == READY:
                self.free.append(self._drop(page))
        for pages in (self.idle, self.parked, self.dirty):
            pages.clear()

    def table(self, page: int) -> str:
        """The error of a store in which every frame is taken."""
        size = self.frames.page_bytes
        held = [page for page, count in enumerate(self.holds) if count]
        used = self.frames.num_frames - len(self.free)
        budget = format_bytes(self.frames.num_frames * size)
        rule = f"all {used} pages in memory are held and page {page} is needed"
        remedy = "raise it, or hold fewer pages at once (smaller blocks, engine.page_mib)"
        rows = [
            line("engine.cpu_bytes", budget, rule, remedy),
            f"  {'tier':<6}{'budget':>12}{'used':>12}{'held':>12}{'needed':>12}",
            f"  {'cpu':<6}{budget:>12}{format_bytes(used * size):>12}"
            f"{format_bytes(len(held) * size):>12}{format_bytes((len(held) + 1) * size):>12}",
        ]
        return "\n".join([*rows, *self._largest(held)])

    def _largest(self, held: Collection[int]) -> Iterator[str]:
        if self.describe is not None:
            by_name = Counter(self.describe(page) for page in held)
            for name, count in by_name.most_common(3):
                yield f"  holds {format_bytes(count * self.frames.page_bytes):>12}  {name}"
