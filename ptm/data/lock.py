"""One builder of a thing on disk at a time; everybody else waits for it and says so.

The lock is the operating system's (flock): it dies with its holder, so a killed builder leaves
nothing to clean up and the next in line takes over. It holds between processes of one machine, and
between machines on file systems that support flock, as Linux NFS does.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.1
HEARTBEAT_S = 10.0
GRACE_S = 5.0
"""How long one that is not the builder waits for somebody to begin, before it builds itself."""


def build_once(
    lock: Path,
    finished: Callable[[], T | None],
    build: Callable[[], T],
    *,
    is_builder: bool = True,
) -> T:
    """`finished()` as soon as it gives something; else `build()`, by one process at a time.

    Whoever waits prints a line about it every HEARTBEAT_S seconds.
    Raises: what `build` raises, to the one that called it; the next in line then tries itself.
    """
    start = told = time.monotonic()
    while (found := finished()) is None:
        if is_builder or time.monotonic() - start > GRACE_S:
            file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if _locked(file):
                    found = finished()  # it may have been finished since
                    return build() if found is None else found
            finally:
                os.close(file)
        if time.monotonic() - told >= HEARTBEAT_S:
            told = time.monotonic()
            holder = lock.read_text() if lock.exists() else "a builder"
            waited = f"{told - start:.0f} s"
            print(f"data: waiting for {holder} to finish ({waited})", file=sys.stderr, flush=True)
        time.sleep(POLL_S)
    return found


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return True
