"""The two tiers of the page store on a host: frames in memory, and a page file on a disk.

Frames are one anonymous mapping, made once: page aligned, so that the disk can write into it past
the system's cache, and page-locked on demand, so that an accelerator can too. The page file is
allocated whole before the run. Reads and writes run in a few threads, several at once; the calls
beneath release the interpreter's lock. Nothing here knows which page is where: that is pager.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import mmap
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from ptm.common.errors import CheckpointError, OutOfPages, PlanError, line
from ptm.common.units import format_bytes
from ptm.engine.disk import File, FolderLock, check_disk, disk_errors, path_line, sync_folder
from ptm.engine.record import Identity, RecordLog, refuse_another

IO_THREADS = 4
"""Requests in flight. Reads of 4 MiB on a virtio disk, 2026-11, two busy cores: 1.8 GiB/s with one,
3.6 with two, 3.4 with four, 3.6 with sixteen; a slower disk may want more than two."""


class Frames:
    """`num_frames` places for a page in memory; `tensors[f]` and `views[f]` show the same bytes."""

    def __init__(self, num_frames: int, page_bytes: int, *, pin: bool) -> None:
        self.page_bytes = page_bytes
        self.num_frames = num_frames
        num_bytes = num_frames * page_bytes
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            arena = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=flags)
        except OSError as error:
            rule = f"cannot be had ({error.strerror})"
            raise OutOfPages(
                line("engine.cpu_bytes", format_bytes(num_bytes), rule, "lower it")
            ) from error
        # NOTE a fork in the middle of an O_DIRECT read into private memory can send what is read
        # to the child: open(2).
        arena.madvise(mmap.MADV_DONTFORK)
        if num_bytes >= 2 << 20:
            with contextlib.suppress(OSError):  # only speed: fewer faults, longer requests
                arena.madvise(mmap.MADV_HUGEPAGE)
        self.arena = torch.frombuffer(arena, dtype=torch.uint8)[:num_bytes]
        self.is_pinned = pin and num_frames > 0
        if self.is_pinned:
            cuda = torch.cuda.cudart() if torch.cuda.is_available() else None
            assert cuda is not None, "page-locked frames need CUDA"
            code = cuda.cudaHostRegister(self.arena.data_ptr(), num_bytes, 0)
            assert int(code) == 0, f"cudaHostRegister({format_bytes(num_bytes)}) gave {code}"
        self.tensors = list(self.arena.split(page_bytes)) if num_frames else []
        whole = memoryview(arena)
        cuts = range(0, num_bytes, page_bytes)
        self.views = [whole[start : start + page_bytes] for start in cuts]

    def close(self) -> None:
        """Give the memory back once no tensor of it is left."""
        if self.is_pinned:
            cuda = torch.cuda.cudart()
            assert cuda is not None
            cuda.cudaHostUnregister(self.arena.data_ptr())
            self.is_pinned = False
        self.tensors, self.views = [], []


class IoThreads:
    """A few threads that run jobs in the order given, urgent ones first. Jobs must not raise."""

    def __init__(self, num_threads: int, name: str) -> None:
        self.num_threads = num_threads
        self._jobs: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._ready = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[..., object], *args: Any, urgent: bool = False) -> None:
        with self._ready:
            assert not self._is_closed, "the page store is closed"
            (self._jobs.appendleft if urgent else self._jobs.append)((job, args))
            self._ready.notify()

    def close(self) -> None:
        """Finish all jobs and end the threads."""
        with self._ready:
            self._is_closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._jobs:
                    if self._is_closed:
                        return
                    self._ready.wait()
                job, args = self._jobs.popleft()
            job(*args)
            del job, args  # or they live until the next job comes


@dataclasses.dataclass(slots=True)
class Traffic:
    """What went one way: requests, bytes, and seconds summed over requests (several overlap)."""

    count: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class SsdTier:
    """The page file of one rank, its lock and its records: `<ssd_path>/<run_id>/rank-00003.pages`.

    `create` makes a new one, `open_existing` goes on with one that has commits; both hold the lock
    until `close`. Then a PageStore owns it.
    """

    def __init__(
        self,
        ssd_path: str | Path,
        identity: Identity,
        *,
        num_threads: int = IO_THREADS,
        direct: bool = True,
        open_file: Callable[..., File] = File,
    ) -> None:
        self.identity = identity
        self.path = identity.file(ssd_path, "pages")
        self._is_new = False
        self.lock = FolderLock(identity.file(ssd_path, "lock"))
        self.log = RecordLog(
            ssd_path, run_id=identity.run_id, rank=identity.rank, open_file=open_file
        )
        self.reads, self.writes = Traffic(), Traffic()
        self.describe: Callable[[int], str] = lambda page: f"page {page}"
        self._counting = threading.Lock()
        try:
            with disk_errors(self.path, "opened"):
                self._file = open_file(self.path, direct=direct)
        except BaseException:
            self.lock.close()
            raise
        self.is_direct = self._file.is_direct
        self.note = ""
        "A line for people when the file goes through the system's cache, though asked not to."
        if direct and not self.is_direct:
            rule = "this file system has no O_DIRECT; pages go through the system's cache"
            remedy = "leave memory for it, or name a folder on ext4 or xfs"
            self.note = line("engine.ssd_path", ssd_path, rule, remedy)
        self.threads = IoThreads(num_threads, f"ptm-io-{identity.rank}")

    @classmethod
    def create(
        cls,
        ssd_path: str | Path,
        identity: Identity,
        *,
        budget_bytes: int | None = None,
        replace: bool = False,
        **options: Any,
    ) -> SsdTier:
        """A new page file of zeros, all of it allocated; commits that are there go, if `replace`.

        Raises: StorageError when the folder is no place for it or in use; PlanError when
        `budget_bytes` is less than it needs; CheckpointError when commits would be lost.
        """
        path, needed = identity.file(ssd_path, "pages"), identity.file_bytes
        if budget_bytes is not None and budget_bytes < needed:
            rule = f"pages of rank {identity.rank} need {format_bytes(needed)}"
            remedy = "raise it or engine.cpu_bytes"
            raise PlanError(line("engine.ssd_bytes", format_bytes(budget_bytes), rule, remedy))
        there = path.stat().st_blocks * 512 if path.exists() else 0
        check_disk(ssd_path, needed, there_bytes=there)
        with disk_errors(path.parent, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
        tier = cls(ssd_path, identity, **options)
        try:
            tier._is_new = True
            steps = [record.step for record in tier.log.read()]
            if steps and not replace:
                rule = f"holds step {max(steps)} of run {identity.run_id}, which would be lost"
                remedy = "resume it, or delete the folder"
                raise CheckpointError(path_line(path.parent, rule, remedy))
            tier.log.drop_after(-1)
            with disk_errors(path, "allocated"):
                tier._file.allocate(needed)
                tier._file.sync()
                sync_folder(path.parent)
                sync_folder(path.parent.parent)
        except BaseException:
            tier.close()
            raise
        return tier

    @classmethod
    def open_existing(cls, ssd_path: str | Path, identity: Identity, **options: Any) -> SsdTier:
        """The page file that `identity` describes, for PageStore.restore.

        Raises: CheckpointError when it has no whole commit or is of another run, world, layout,
        page size or format; StorageError when it is in use or cannot be read.
        """
        path = identity.file(ssd_path, "pages")
        log = RecordLog(ssd_path, run_id=identity.run_id, rank=identity.rank)
        records = log.read()
        for record in records:
            refuse_another(record.identity, identity, path)
        if not records or not path.exists():
            rule = "; ".join(["holds no committed step", *log.damaged])
            remedy = "resume from a checkpoint folder, or start anew"
            raise CheckpointError(path_line(path, rule, remedy))
        if (size := path.stat().st_size) != identity.file_bytes:
            rule = f"is {size} bytes long, its record says {identity.file_bytes}"
            raise CheckpointError(path_line(path, rule, "resume from a checkpoint folder"))
        return cls(ssd_path, identity, **options)

    def read(self, page: int, slot: int, into: memoryview, digest: int | None) -> None:
        """Read a slot and compare with its checksum. Raises StorageError, CheckpointError."""
        offset = self.identity.offset(page, slot)
        with self._counted(self.reads, "read"):
            self._file.read(offset, into)
        if digest is not None and xxhash.xxh3_64_intdigest(into) != digest:
            raise damaged_page(self.path, page, offset, self.describe(page))

    def write(self, page: int, slot: int, data: memoryview) -> int:
        """Write a slot; returns the checksum of what was written. Raises StorageError."""
        digest = xxhash.xxh3_64_intdigest(data)
        with self._counted(self.writes, "written"):
            self._file.write(self.identity.offset(page, slot), data)
        return digest

    def sync(self) -> None:
        """All that was written is on the disk afterwards. Raises StorageError."""
        with disk_errors(self.path, "written"):
            self._file.sync()

    def close(self) -> None:
        """End; a new file to which nothing was committed goes."""
        self.threads.close()
        self._file.close()
        if self._is_new and self.log.is_empty:
            for kind in ("pages", "record-a", "record-b", "lock"):
                with contextlib.suppress(OSError):
                    self.identity.file(self.path.parents[1], kind).unlink()
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()
        self.lock.close()

    @contextlib.contextmanager
    def _counted(self, traffic: Traffic, verb: str) -> Iterator[None]:
        start = time.perf_counter()
        with disk_errors(self.path, verb):
            yield
        elapsed = time.perf_counter() - start
        with self._counting:
            traffic.count += 1
            traffic.num_bytes += self.identity.page_bytes
            traffic.seconds += elapsed


def damage_mark(path: Path) -> Path:
    """Beside the page file `path`: there from the moment that a page of it was found damaged, for
    the next start to read all of them before it trusts any."""
    return path.with_suffix(".damaged")


def damaged_page(path: Path, page: int, offset: int, what: str) -> CheckpointError:
    """Mark the file, and say it."""
    rule = f"page {page} at byte {offset} ({what}) is not what was written"
    remedy = "look at the disk; the same command goes on from what is whole"
    error = CheckpointError(path_line(path, rule, remedy))
    with contextlib.suppress(OSError):
        damage_mark(path).write_text(f"{error}\n")
        sync_folder(path.parent)
    return error


class Probe(NamedTuple):
    read_bytes_per_s: float
    write_bytes_per_s: float


ASSUMED = Probe(1e9, 1e9)
"""For a disk without room for a probe: rates decide when pages move, not whether or what."""


def probe(
    path: str | Path, page_bytes: int, seconds: float, *, num_threads: int = IO_THREADS
) -> Probe:
    """Rates of the disk under folder `path` for requests of a page each, as a page file makes them.

    Takes about `seconds`, half for each direction, 64 pages of the disk (fewer where it is nearly
    full) and half as many of memory
    (as in a run, more than caches hold); writes end with a sync. Raises StorageError.
    """
    with disk_errors(Path(path), "read"):
        free = shutil.disk_usage(path).free
    # Beside a page file that takes nearly all of a disk, less must do.
    num_pages = next((n for n in (64, 16, 4) if 4 * n * page_bytes < free), 0)
    if not num_pages:
        return ASSUMED
    name = Path(path) / f"probe-{os.getpid()}-{time.monotonic_ns()}"
    frames = Frames(num_pages // 2, page_bytes, pin=False)
    with disk_errors(name, "written"):
        file = File(name, direct=True)
        name.unlink()  # a kill from here on leaves nothing
        try:
            file.allocate(num_pages * page_bytes)
            for page in range(num_pages):  # so that no block is new to the file system
                file.write(page * page_bytes, frames.views[0])
            file.sync()
            rates = []
            for move, finish in ((file.read, None), (file.write, file.sync)):
                rates.append(_rate(move, finish, frames, num_threads, seconds / 2))
            return Probe(*rates)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return ASSUMED  # somebody else has taken the room meanwhile
        finally:
            file.close()


def _rate(
    move: Callable[[int, memoryview], None],
    finish: Callable[[], None] | None,
    frames: Frames,
    num_threads: int,
    seconds: float,
) -> float:
    counts, errors = [0] * num_threads, []
    start = time.perf_counter()

    def work(thread: int) -> None:
        page = thread
        try:
            while True:  # once at least, or a busy machine would show a rate of zero
                move(page * frames.page_bytes, frames.views[page % frames.num_frames])
                counts[thread] += 1
                page = (page + num_threads) % (2 * frames.num_frames)
                if time.perf_counter() - start >= seconds:
                    break
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if finish:
        finish()
    return sum(counts) * frames.page_bytes / (time.perf_counter() - start)
