"""The page store: pages of a rank's states, in memory as far as the budget goes, else on a disk.

A page is a fixed number of bytes that nobody here interprets. Whoever works on one holds it; a held
page is in a frame and stays there, any other may be sent to the page file at any time:

    data = store.hold(page, write=True)     # uint8 (page_bytes,); a page never written is zeros
    data.view(torch.float32).add_(1)
    store.release(page, dirty=True)

Threads hold and release at will; two that hold one page at once see the same bytes, and agree among
themselves who writes. What is where is pager.py, when pages move ahead of need follow.py, how the
file is a checkpoint commit.py.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ptm.common.errors import OutOfPages, line
from ptm.common.units import format_bytes
from ptm.engine.commit import Committer, Slots
from ptm.engine.follow import Follower, Order, Schedule
from ptm.engine.pager import FETCHING, READY, Pager
from ptm.engine.record import NO_SLOT
from ptm.engine.tier import Frames, SsdTier


class Policy(Protocol):
    """Called under the store's lock: it must not call the store."""

    def touched(self, page: int, position: int) -> None: ...
    def victim(self, candidates: Iterable[int], position: int) -> int: ...
    def follow(self, uses: Any) -> None: ...


class PageStore:
    """Made once by the engine; then hold and release, step after step; `close` at the end.

    With `ssd`, which it owns from then on, it commits and restores; a tier from `open_existing` is
    restored before anything is held. `agree(step)` returns once every rank has committed `step`
    (none: at once); it is called in a thread of the store's own.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_bytes: int,
        num_frames: int,
        durable: range,
        ssd: SsdTier | None,
        policy: Policy,
        pin: bool,
        describe: Callable[[int], str] | None = None,
        agree: Callable[[int], None] | None = None,
        num_elsewhere: int = 0,
    ) -> None:
        """num_elsewhere: pages that are never held here; `put` and `get` are for them."""
        assert page_bytes % 4096 == 0 and durable.step == 1, f"{page_bytes=} {durable=}"
        num_frames = min(num_frames, num_pages - num_elsewhere)
        _check_budget(num_pages - num_elsewhere, num_frames, page_bytes, ssd)
        self.num_pages, self.page_bytes, self.durable = num_pages, page_bytes, durable
        self._ssd, self._policy = ssd, policy
        self._frames = Frames(num_frames, page_bytes, pin=pin)
        self._slots = Slots(
            num_pages, durable, ssd.identity.frozen if ssd is not None else range(0)
        )
        self._pager = Pager(
            frames=self._frames, slots=self._slots, ssd=ssd, policy=policy, num_pages=num_pages
        )
        self._pager.describe = describe
        self._lock = self._pager.lock
        self._committer: Committer | None = None
        self._must_restore = False
        if ssd is not None:
            identity = ssd.identity
            found = (identity.num_pages, identity.page_bytes, identity.durable)
            assert found == (num_pages, page_bytes, durable), f"{identity} is of other pages"
            if describe is not None:
                ssd.describe = describe
            self._committer = Committer(self._pager, ssd, agree)
            self._must_restore = bool(ssd.log.read())
        self._follower: Follower | None = None
        self._trace: Callable[[int, bool, str, float], None] | None = None
        self._what = threading.local()
        self._hits = self._misses = 0
        self._waited_s = 0.0
        self._is_closed = False

    def hold(self, page: int, *, write: bool = False) -> Tensor:
        """The page's bytes, uint8 (page_bytes,), in memory until as many `release`s as holds.

        With `write` they may be changed; this waits until a commit in progress has taken them.
        Raises: OutOfPages when all frames are held for good; StorageError and CheckpointError for
        what the disk did, also if it did that to another page in the background.
        """
        pager = self._pager
        waited_s = 0.0
        with self._lock:
            if (
                pager.state[page] != READY
                or pager.failure is not None
                or (write and (page in pager.writing or page in pager.unflushed))
            ):
                waited_s = self._make_ready(page, write)
            else:
                self._hits += 1
            count = pager.holds[page]
            pager.holds[page] = count + 1
            if count == 0:
                pager.keep(page)
            me = threading.get_ident()
            pager.holders[me] = pager.holders.get(me, 0) + 1
            if write:
                pager.writers[page] = pager.writers.get(page, 0) + 1
            data = self._frames.tensors[pager.frame[page]]
            follower = self._follower
            if follower is not None:
                orders = follower.saw(page, getattr(self._what, "label", ""))
                pager.position = follower.position
                self._policy.touched(page, pager.position)
                if orders or follower.late or pager.given_up:
                    self._issue(follower, orders)
            else:
                self._policy.touched(page, 0)
        if self._trace is not None:
            self._trace(page, write, getattr(self._what, "label", ""), waited_s)
        return data

    def release(self, page: int, *, dirty: bool = False) -> None:
        """End one hold; `dirty` if and only if that was for writing."""
        pager = self._pager
        with self._lock:
            count = pager.holds[page] - 1
            assert count >= 0, f"page {page} is not held"
            if dirty:
                writers = pager.writers.get(page, 0) - 1
                assert writers >= 0, f"page {page} was not held for writing"
                if writers:
                    pager.writers[page] = writers
                else:
                    del pager.writers[page]
                pager.dirty.add(page)
            pager.holds[page] = count
            me = threading.get_ident()
            pager.holders[me] = pager.holders.get(me, 0) - 1
            if count == 0:
                assert page not in pager.writers, f"page {page} was held for writing: dirty=True"
                pager.settle(page)
                follower = self._follower
                if follower is not None:
                    if dirty and page in follower.over:
                        follower.over.discard(page)
                        pager.write_soon([page])
                    if follower.late or pager.given_up:
                        self._issue(follower, ())

    def prefetch(self, pages: Iterable[int]) -> None:
        """Start to bring `pages` in, as far as frames come free; waits for nothing."""
        with self._lock:
            for page in pages:
                if not self._pager.prefetch(page, evicts=None, may_evict=lambda victim: True):
                    self._pager.num_given_up += 1

    def discard(self, pages: Iterable[int]) -> None:
        """Forget the content of pages that are not durable and not held: zeros at the next hold,
        and nothing to write when they leave."""
        with self._lock:
            self._pager.discard(pages)

    def set_schedule(self, schedule: Schedule | None) -> None:
        """Follow `schedule` from the next `begin_step` on; the policy follows it too."""
        with self._lock:
            self._follower = None if schedule is None else Follower(schedule)
            self._pager.position = -1
            if schedule is not None:
                self._policy.follow(schedule)

    @property
    def schedule(self) -> Schedule | None:
        return None if self._follower is None else self._follower.schedule

    def begin_step(self) -> None:
        """A step begins: its first access is the next one expected."""
        with self._lock:
            if self._follower is not None:
                orders = self._follower.begin()
                self._pager.position = self._follower.position
                self._issue(self._follower, orders)

    def trace_into(self, callback: Callable[[int, bool, str, float], None] | None) -> None:
        """Call `callback(page, is_write, what, waited_s)` after every hold, in its thread."""
        self._trace = callback

    def note(self, what: str) -> None:
        """What this thread holds pages for from now on, for the trace."""
        self._what.label = what

    def commit(self, step: int, meta: dict[str, Any]) -> None:
        """Begin to make the durable pages, as they are now, what `restore(step)` will give.

        No durable page may be held for writing. Waits for the commit before, not for this one.
        Raises: as `wait_commit`.
        """
        committer = self._committer
        assert committer is not None, "commit without a disk"
        self.wait_commit()
        with self._lock:
            writing = [page for page in self._pager.writers if page in self.durable]
            assert not writing, f"pages {writing[:8]} are held for writing at the commit of {step}"
            assert not self._must_restore, "restore first"
            committer.start(step, meta)

    def wait_commit(self) -> None:
        """Return when the last commit is on the disk of all ranks. Raises what stood in its way:
        StorageError, or what `agree` raised."""
        with self._lock:
            self._pager.check()
            while self._committer is not None and self._committer.pending is not None:
                self._pager.changed.wait()
                self._pager.check()

    def records(self) -> list[tuple[int, dict[str, Any]]]:
        """Committed (step, meta), oldest first; two at most. `damaged` says what is not whole."""
        assert self._ssd is not None, "records without a disk"
        self.wait_commit()
        return [(record.step, record.meta) for record in self._ssd.log.read()]

    def undo(self) -> None:
        """Make the durable pages what they were at the last commit, which this waits for; others
        keep what they hold. No durable page may be held."""
        self.wait_commit()
        with self._lock:
            self._pager.undo()

    @property
    def damaged(self) -> list[str]:
        """A line for each record file that could not be read."""
        return [] if self._ssd is None else self._ssd.log.damaged

    def restore(self, step: int) -> None:
        """Make the durable pages what they were at `commit(step)`; others become zeros.

        Nothing may be held. Later records are dropped. Pages are read, and compared with their
        checksums, when they are held. Raises: CheckpointError when `step` is not there.
        """
        assert self._ssd is not None and self._committer is not None, "restore without a disk"
        self.wait_commit()
        record = self._ssd.log.find(step)
        self._ssd.log.drop_after(step)
        with self._lock:
            self._pager.reset()
            self._slots.restore(record)
            self._committer.last_step = step
            self._must_restore = False

    @property
    def has_disk(self) -> bool:
        return self._ssd is not None

    def put(self, page: int, data: memoryview) -> None:
        """Write a durable page that is held elsewhere to the page file, for the next commit; not
        while one is in progress. Raises StorageError."""
        slot = self._slots.target(page)
        assert self._ssd is not None and slot is not None, f"page {page} has no slot to go to"
        digest = self._ssd.write(page, slot, data)
        with self._lock:
            self._slots.wrote(page, slot, digest, in_commit=False)

    def get(self, page: int, into: memoryview) -> None:
        """Read what was `put` last, zeros if nothing was. Raises StorageError, CheckpointError."""
        slot = self._slots.now[page]
        if slot == NO_SLOT:
            into[:] = bytes(len(into))
        else:
            assert self._ssd is not None
            self._ssd.read(page, slot, into, self._slots.sums[page])

    def at_once(
        self, move: Callable[[int, memoryview], None], items: Sequence[tuple[int, memoryview]]
    ) -> None:
        """`put` or `get` for several pages, in the disk's threads. Raises what the first raised."""
        assert self._ssd is not None, "pages are moved without a disk"
        ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def run(page: int, data: memoryview) -> None:
            try:
                move(page, data)
            except BaseException as error:  # raised below, in the thread that asked
                ends.put(error)
            else:
                ends.put(None)

        for item in items:
            self._ssd.threads.submit(run, *item)
        for error in [ends.get() for _ in items]:
            if error is not None:
                raise error

    def report(self) -> dict[str, float]:
        """Counts, bytes and seconds since the store was made. Seconds of reads and writes are
        summed over requests, of which several overlap; waited_s is what holds waited."""
        pager, ssd = self._pager, self._ssd
        with self._lock:
            found = {
                "hits": float(self._hits),
                "misses": float(self._misses),
                "waited_s": self._waited_s,
                "prefetches_given_up": float(pager.num_given_up),
                "frames": float(self._frames.num_frames),
                "frames_used": float(self._frames.num_frames - len(pager.free)),
                "commits": float(self._committer.num_commits if self._committer else 0),
            }
        for name, traffic in (("read", ssd and ssd.reads), ("write", ssd and ssd.writes)):
            found[f"{name}s"] = float(traffic.count if traffic else 0)
            found[f"{name}_bytes"] = float(traffic.num_bytes if traffic else 0)
            found[f"{name}_s"] = traffic.seconds if traffic else 0.0
        return found

    def close(self) -> None:
        """Let I/O and a commit in progress end, and free the tiers. Raises an error of the
        background that nobody was told yet."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._committer is not None:
            self._committer.close()
        if self._ssd is not None:
            self._ssd.close()
        self._frames.close()
        failure = self._pager.failure
        if failure is not None and not self._pager.is_told:
            raise failure

    def _make_ready(self, page: int, write: bool) -> float:
        """Bring `page` in, or wait until it may be written; the lock is held before and after.
        Returns the seconds that took."""
        pager = self._pager
        assert not self._must_restore, "restore first"
        assert not self._is_closed, "the page store is closed"
        start = time.perf_counter()
        while True:
            pager.check()
            state = pager.state[page]
            if state == READY:
                if not write or (page not in pager.writing and page not in pager.unflushed):
                    break
                pager.stay(page)
                if page not in pager.writing:
                    pager.write_back(page, urgent=True)
                pager.changed.wait()
            elif state == FETCHING and page not in pager.queued:
                pager.changed.wait()
            elif pager.take_over(page) or pager.frame_for(page) is not None:
                self._lock.release()
                try:
                    pager.load(page, ahead=False)
                finally:
                    self._lock.acquire()
        elapsed = time.perf_counter() - start
        self._misses += 1
        self._waited_s += elapsed
        return elapsed

    def _issue(self, follower: Follower, orders: Sequence[Order]) -> None:
        """Start what the schedule orders now, unless that costs a page which is needed sooner; what
        finds no frame is tried again at each hold and release, until the page is needed."""
        schedule, position = follower.schedule, follower.position
        if self._pager.given_up:
            follower.again(self._pager.given_up)
            self._pager.given_up.clear()
        for order in follower.with_late(orders):
            needed = follower.needed(order)
            if not self._pager.prefetch(
                order.page,
                evicts=order.evicts,
                may_evict=lambda page: schedule.next_use(page, position) > needed,  # noqa: B023
            ):
                follower.put_off(order)


def _check_budget(num_pages: int, num_frames: int, page_bytes: int, ssd: SsdTier | None) -> None:
    missing = (num_pages - num_frames) * page_bytes
    if ssd is None and missing:
        rule = f"{format_bytes(num_pages * page_bytes)} of pages need {missing} bytes more"
        remedy = "raise it, or name an engine.ssd_path"
        raise OutOfPages(
            line("engine.cpu_bytes", format_bytes(num_frames * page_bytes), rule, remedy)
        )
    if num_pages and not num_frames:
        rule = f"not one page of {format_bytes(page_bytes)} fits"
        raise OutOfPages(line("engine.cpu_bytes", "0 B", rule, "raise it"))
