"""A progress bar with the time left; plain lines where there is no terminal; nothing when quiet."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

PLAIN_EVERY_S = 5.0


class ThingsDone:
    """Counts things up to a total, for people."""

    def __init__(self, title: str, total: int, *, is_shown: bool) -> None:
        self.title, self.total, self.done = title, max(total, 1), 0
        self.start = self.told = time.monotonic()
        self.console = Console(stderr=True, quiet=not is_shown)
        self.bar: Progress | None = None
        if is_shown and self.console.is_terminal:
            columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(title, total=self.total)

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif now - self.told >= PLAIN_EVERY_S:
            self.told = now
            left = (now - self.start) / self.done * (self.total - self.done)
            text = f"{self.title}: {self.done:,} of {self.total:,}, {left:.0f} s left"
            self.console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> ThingsDone:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


class BytesDone:
    """Counts bytes up to a total, for people; `advance` may be called from any thread."""

    def __init__(self, title: str, total_bytes: int, *, is_shown: bool) -> None:
        self.title, self.total_bytes = title, max(total_bytes, 1)
        self.done_bytes = 0
        self.start = self.told = time.monotonic()
        self.lock = threading.Lock()
        self.console = Console(stderr=True, quiet=not is_shown)
        self.bar: Progress | None = None
        if is_shown and self.console.is_terminal:
            columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task(title, total=self.total_bytes)

    def advance(self, num_bytes: int) -> None:
        with self.lock:
            self.done_bytes = min(self.done_bytes + num_bytes, self.total_bytes)
            if self.bar is not None:
                self.bar.update(self.task, completed=self.done_bytes)
            elif time.monotonic() - self.told >= PLAIN_EVERY_S:
                self.told = time.monotonic()
                self.console.print(self._plain(), highlight=False, soft_wrap=True)

    def __enter__(self) -> BytesDone:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _plain(self) -> str:
        passed_s = time.monotonic() - self.start
        rate = self.done_bytes / passed_s
        left = f"{(self.total_bytes - self.done_bytes) / rate:.0f} s left" if rate else ""
        of = f"{self.done_bytes / 1e6:.1f} of {self.total_bytes / 1e6:.1f} MB"
        return f"{self.title}: {of}, {rate / 1e6:.1f} MB/s, {left}"
