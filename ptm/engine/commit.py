"""How the page file is a checkpoint at every commit: slots, the commit in the background, readers.

A durable page has two slots. The record of the last commit that all ranks have names one of them,
and no write touches that one: newer content goes to the other. One commit:

    1  commit(step): the dirty durable pages are noted, and training goes on; who wants to write
       one of them waits until it is on its way to the disk
    2  each of them is written to the slot that the last commit does not name
    3  the page file is synced
    4  the record, with the slot and checksum of every page, replaces the one before the last,
       and is synced: from here on this rank can continue from `step`
    5  `agree(step)` returns when every rank has come this far: from here on no rank will go back
       further, and the slots of the commit before may be written

A kill before 4 leaves the commit before; a kill between 4 and 5 leaves both, so that ranks of which
some had `step` and some had not meet at the one before. Nothing may write a page in between that
both commits name in different slots: such pages stay in memory (`parked`) until 5.
After a restart the ranks go on from the newest step that all of them have; a rank with a newer one
drops that record first, as its slots are about to be written.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from ptm.engine.disk import File, disk_errors
from ptm.engine.record import NO_SLOT, Identity, Record, RecordLog, rank_file
from ptm.engine.tier import SsdTier, damaged_page

if TYPE_CHECKING:
    from ptm.engine.pager import Pager


class Slots:
    """For each page the slot of its newest content in the file and its checksum, and for durable
    pages the slots that records name, which must not be written. Frozen pages have one, and are
    not written once a commit has it."""

    def __init__(self, num_pages: int, durable: range, frozen: range = range(0)) -> None:
        self.durable, self.frozen = durable, frozen
        self.now = bytearray([NO_SLOT]) * num_pages
        self.sums = array("Q", bytes(8 * num_pages))
        self.agreed = bytearray([NO_SLOT]) * len(durable)
        "Named by the last commit that all ranks have, with the checksums of what is there."
        self.agreed_sums = array("Q", bytes(8 * len(durable)))
        self.pending: bytearray | None = None
        "Named by the commit in progress: final for a page once that is written."
        self.pending_sums = array("Q")

    def target(self, page: int) -> int | None:
        """The slot to write `page` to; None when both are taken by commits."""
        if page not in self.durable:
            return 0
        at = page - self.durable.start
        kept = self.agreed[at]
        assert page not in self.frozen or kept == NO_SLOT, f"page {page} is frozen, and committed"
        if self.pending is None or self.pending[at] in (kept, NO_SLOT):
            return 1 if kept == 0 else 0
        if kept == NO_SLOT:
            return 1 - self.pending[at]
        return None

    def wrote(self, page: int, slot: int, digest: int, *, in_commit: bool) -> None:
        self.now[page], self.sums[page] = slot, digest
        if in_commit:
            assert self.pending is not None
            at = page - self.durable.start
            self.pending[at], self.pending_sums[at] = slot, digest

    def forget(self, page: int) -> None:
        assert page not in self.durable, f"page {page} is durable"
        self.now[page] = NO_SLOT

    def begin(self, unflushed: Iterable[int]) -> None:
        """A commit begins, for which `unflushed` have to be written first."""
        first, stop = self.durable.start, self.durable.stop
        self.pending = self.now[first:stop]
        self.pending_sums = self.sums[first:stop]
        for page in unflushed:  # what lies in the slot they will go to is of no use any more
            self.pending[page - first] = self.agreed[page - first]

    def finish(self) -> None:
        assert self.pending is not None
        self.agreed, self.pending = self.pending, None
        self.agreed_sums = self.pending_sums

    def undo(self) -> list[int]:
        """Back to the last commit; returns the durable pages whose content that changes."""
        first, stop = self.durable.start, self.durable.stop
        changed = [p for p in self.durable if self.now[p] != self.agreed[p - first]]
        self.now[first:stop], self.sums[first:stop] = self.agreed, self.agreed_sums
        return changed

    def restore(self, record: Record) -> None:
        first, stop = self.durable.start, self.durable.stop
        self.now[:] = bytearray([NO_SLOT]) * len(self.now)
        self.now[first:stop] = record.slots
        self.sums[first:stop] = record.sums
        self.agreed, self.agreed_sums = bytearray(record.slots), array("Q", record.sums)


class Committer:
    """Takes one commit at a time through steps 2 to 5 in a thread of its own."""

    def __init__(self, pager: Pager, ssd: SsdTier, agree: Callable[[int], None] | None) -> None:
        self.pager, self.ssd, self.agree = pager, ssd, agree
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.last_step = -1
        self.num_commits = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="ptm-commit", daemon=True)
        self._thread.start()

    def start(self, step: int, meta: dict[str, Any]) -> None:
        """Step 1; the lock is held and no commit is in progress."""
        assert step > self.last_step, f"commit of step {step} after step {self.last_step}"
        pager = self.pager
        pager.unflushed.update(page for page in pager.dirty if page in pager.slots.durable)
        pager.slots.begin(pager.unflushed)
        pager.write_soon(sorted(pager.unflushed))
        self.pending = (step, meta)
        pager.changed.notify_all()

    def close(self) -> None:
        """Let the commit in progress end, and the thread too."""
        with self.pager.lock:
            self._is_closed = True
            self.pager.changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        pager = self.pager
        while True:
            with pager.lock:
                while self.pending is None:
                    if self._is_closed:
                        return
                    pager.changed.wait()
                if pager.failure is not None:
                    return
                step, meta = self.pending
            try:
                self._flush()
                self._record(step, meta)
                if self.agree is not None:
                    self.agree(step)
            except BaseException as error:
                with pager.lock:
                    pager.fail(error)
                return
            with pager.lock:
                pager.slots.finish()
                self.pending, self.last_step = None, step
                self.num_commits += 1
                pager.unpark()

    def _flush(self) -> None:
        """Wait until what is noted is written."""
        pager = self.pager
        with pager.lock:
            while pager.unflushed:
                if pager.failure is not None:
                    raise pager.failure
                pager.changed.wait()

    def _record(self, step: int, meta: dict[str, Any]) -> None:
        slots = self.pager.slots
        self.ssd.sync()
        assert slots.pending is not None
        record = Record(self.ssd.identity, step, meta, slots.pending, slots.pending_sums)
        self.ssd.log.write(record)


class PageReader:
    """Any rank's pages as of one committed step, read only: to reshard, to repair, to look.

    May be open beside the run that writes, as long as that has not committed twice since `step`.
    Raises: CheckpointError when the step is not there or a page is damaged; StorageError.
    """

    def __init__(
        self,
        ssd_path: str | Path,
        *,
        run_id: str,
        rank: int,
        step: int,
        describe: Callable[[int], str] = lambda page: f"page {page}",
    ) -> None:
        self.record = RecordLog(ssd_path, run_id=run_id, rank=rank).find(step)
        self.path = rank_file(ssd_path, run_id, rank, "pages")
        self.describe = describe
        with disk_errors(self.path, "opened"):
            self._file = File(self.path, read_only=True)

    @staticmethod
    def records(ssd_path: str | Path, *, run_id: str, rank: int) -> list[Record]:
        """All whole commits of a rank, oldest first."""
        return RecordLog(ssd_path, run_id=run_id, rank=rank).read()

    @property
    def identity(self) -> Identity:
        return self.record.identity

    def read(self, page: int) -> Tensor:
        """uint8 (page_bytes,) of a durable page, compared with its checksum."""
        identity = self.record.identity
        assert page in identity.durable, f"page {page} is not durable ({identity.durable})"
        slot = self.record.slots[page - identity.durable_start]
        data = bytearray(identity.page_bytes)
        if slot != NO_SLOT:
            offset = identity.offset(page, slot)
            view = memoryview(data)
            with disk_errors(self.path, "read"):
                self._file.read(offset, view)
            if xxhash.xxh3_64_intdigest(view) != self.record.sums[page - identity.durable_start]:
                raise damaged_page(self.path, page, offset, self.describe(page))
        return torch.frombuffer(data, dtype=torch.uint8)

    def verify(self) -> None:
        """Read every page. Raises CheckpointError naming the first that is damaged."""
        for page in self.identity.durable:
            self.read(page)

    def close(self) -> None:
        self._file.close()
