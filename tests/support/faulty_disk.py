"""The writer of checkpoints on a disk that is slow, full, failing, or lies."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

from ptm.checkpoint.dcp_writer import ShardWriter


class FaultyDisk(FileSystem):
    """`on_write(path, data)` may sleep, raise OSError, or return other bytes to write. It is called
    for the header of a file and for each tensor in it."""

    def __init__(self, on_write: Callable[[str, bytes], bytes | None]) -> None:
        self.on_write = on_write

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            write = stream.write

            def faulty(data: bytes | memoryview) -> int:
                changed = self.on_write(os.fspath(path), bytes(data))
                return write(data if changed is None else changed)

            yield _Stream(stream, faulty)  # type: ignore[misc]


class _Stream:
    def __init__(self, stream: io.IOBase, write: Callable[[bytes], int]) -> None:
        self.stream, self.write = stream, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def writer_on(on_write: Callable[[str, bytes], bytes | None]) -> Callable[..., Any]:
    """A `writer` for Saver whose files are written through `on_write`."""

    def make(*args: Any) -> ShardWriter:
        writer = ShardWriter(*args)
        writer.fs = FaultyDisk(on_write)
        return writer

    return make


def slow(seconds: float) -> Callable[..., Any]:
    """Every file takes that long to begin."""
    begun: set[str] = set()

    def on_write(path: str, data: bytes) -> None:
        if path not in begun:
            begun.add(path)
            time.sleep(seconds)

    return writer_on(on_write)


def failing(error: int, when: Callable[[str], bool] = lambda path: True) -> Callable[..., Any]:
    """Every file for which `when(path)` fails with errno `error`, half-way."""

    def on_write(path: str, data: bytes) -> None:
        if when(path):
            with open(path, "ab") as file:
                file.write(data[: len(data) // 2])
            raise OSError(error, os.strerror(error), path)

    return writer_on(on_write)


def lying() -> Callable[..., Any]:
    """One bit in the last byte of each tensor is not what was written."""

    def on_write(path: str, data: bytes) -> bytes:
        is_header = data[8:9] == b"{" and int.from_bytes(data[:8], "little") == len(data) - 8
        return data if is_header else data[:-1] + bytes([data[-1] ^ 4])

    return writer_on(on_write)
