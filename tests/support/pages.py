"""Small page stores for tests: pages of a few KiB, a policy that chooses badly on purpose, disks
that fail or lose power."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptm.engine.disk import File
from ptm.engine.record import Identity
from ptm.engine.store import PageStore
from ptm.engine.tier import SsdTier

PAGE = 4096


class AnyPage:
    """Sends away a page by chance: the store must be right whatever the policy says."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)

    def touched(self, page: int, position: int) -> None:
        del page, position

    def victim(self, candidates: Iterable[int], position: int) -> int:
        del position
        return self.random.choice(sorted(candidates))

    def follow(self, uses: Any) -> None:
        self.uses = uses


class Use(NamedTuple):
    page: int
    what: str = "forward"


class Fetch(NamedTuple):
    at: int
    page: int
    needed_at: int
    evicts: int | None


class TinySchedule:
    """A schedule over a list of pages with orders given by hand; a page may come with what it is
    used for."""

    def __init__(self, uses: list[int] | list[tuple[int, str]], orders: list[Fetch]) -> None:
        self.accesses = [Use(use) if isinstance(use, int) else Use(*use) for use in uses]
        self.orders = orders
        self.flushes: list[Any] = []
        self.trace = self

    @property
    def num_positions(self) -> int:
        return len(self.accesses)

    def next_use(self, page: int, position: int) -> int:
        count = len(self.accesses)
        later = [i for i in range(position + 1, position + 1 + count)]
        found = (i for i in later if self.accesses[i % count].page == page)
        return next(found, position + 3 * count)


def identity(
    *, num_pages: int = 8, durable: range | None = None, page_bytes: int = PAGE, **changed: Any
) -> Identity:
    durable = range(num_pages) if durable is None else durable
    values: dict[str, Any] = {
        "run_id": "run",
        "world": 1,
        "rank": 0,
        "ep": 1,
        "page_bytes": page_bytes,
        "num_pages": num_pages,
        "durable_start": durable.start,
        "durable_stop": durable.stop,
        "layout": "layout-1",
    }
    return Identity(**{**values, **changed})


def store_on(ssd: SsdTier | None, *, num_frames: int, **options: Any) -> PageStore:
    """A store over `ssd`, or over memory alone."""
    if ssd is not None:
        it = ssd.identity
        options = {
            "num_pages": it.num_pages,
            "page_bytes": it.page_bytes,
            "durable": it.durable,
            **options,
        }
    options = {"policy": AnyPage(), "pin": False, **options}
    return PageStore(num_frames=num_frames, ssd=ssd, **options)


def new_store(path: Path, *, num_frames: int, store: dict[str, Any] | None = None, **options: Any):  # noqa: ANN201
    """A store over a new page file; `options` go to `identity`."""
    return store_on(SsdTier.create(path, identity(**options)), num_frames=num_frames, **store or {})


def reopened(path: Path, *, num_frames: int, store: dict[str, Any] | None = None, **options: Any):  # noqa: ANN201
    ssd = SsdTier.open_existing(path, identity(**options))
    return store_on(ssd, num_frames=num_frames, **store or {})


def fill(store: PageStore, page: int, value: int) -> None:
    store.hold(page, write=True).view(torch.int64).fill_(value)
    store.release(page, dirty=True)


def value_of(store: PageStore, page: int) -> int:
    """What `fill` put there; fails when it is not the same everywhere in the page."""
    data = store.hold(page).view(torch.int64)
    first = int(data[0])
    assert bool((data == first).all()), f"page {page} is torn"
    store.release(page)
    return first


class Failing(File):
    """A file of which the writes fail with `error` once `after` of them went well."""

    error, after = errno.ENOSPC, 0

    def write(self, offset: int, data: memoryview) -> None:
        cls = type(self)
        if cls.after <= 0:
            raise OSError(cls.error, os.strerror(cls.error), str(self.path))
        cls.after -= 1
        super().write(offset, data)


class Volatile(File):
    """A disk with a cache that a power cut loses: what was not synced reaches the file in part.

    `cut(random)` applies a random choice of the blocks written since the last sync, in no order.
    """

    block = 512
    files: list[Volatile] = []

    def __init__(self, path: Path, *, direct: bool = False, read_only: bool = False) -> None:
        super().__init__(path, direct=False, read_only=read_only)
        self.unsynced: dict[int, bytes] = {}
        self.length: int | None = None
        self.lock = threading.Lock()
        self.is_off = False
        type(self).files.append(self)

    def write(self, offset: int, data: memoryview) -> None:
        raw = bytes(data)
        with self.lock:
            for start in range(0, len(raw), self.block):
                self.unsynced[offset + start] = raw[start : start + self.block]

    def read(self, offset: int, into: memoryview) -> None:
        with self.lock:
            super().read(offset, into)
            for start in range(offset, offset + len(into), self.block):
                if start in self.unsynced:
                    into[start - offset : start - offset + self.block] = self.unsynced[start]

    def truncate(self, num_bytes: int) -> None:
        self.length = num_bytes

    def sync(self) -> None:
        with self.lock:
            if self.is_off:
                raise OSError(errno.ENODEV, "power is off")
            for start, raw in self.unsynced.items():
                super().write(start, memoryview(raw))
            self.unsynced.clear()
            if self.length is not None:
                super().truncate(self.length)
                self.length = None

    def close(self) -> None:
        pass

    @classmethod
    def cut(cls, chance: random.Random) -> None:
        """Power is gone. Files opened before are of no use after this."""
        for file in cls.files:
            with file.lock:
                for start, raw in file.unsynced.items():
                    if chance.random() < 0.5:
                        File.write(file, start, memoryview(raw))
                if file.length is not None and chance.random() < 0.5:
                    File.truncate(file, file.length)
                file.is_off = True
                File.close(file)
        cls.files = []
