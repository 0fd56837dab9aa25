"""Reading files of a folder that nobody vouches for.

A model folder comes from a stranger, so its files are data and never anything else: plain names,
regular files inside the folder, sizes bounded before a byte is parsed, JSON without duplicate keys,
NaN or nesting bombs. Everything wrong is a CheckpointError of one line that names the file.

A link that leads out of the folder is refused, as is a pipe or device, which could block for ever.
A folder that changes while it is read is not guarded against: the reader may see some of each.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptm.common.errors import CheckpointError, line

MAX_JSON_BYTES = 2**20
MAX_LISTS = 1_000_000  # and objects; a header's tensor takes three, and each costs 64 bytes or more
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")


@contextlib.contextmanager
def open_file(folder: Path, name: str) -> Iterator[int]:
    """Descriptor of a regular file in `folder`, closed at the end. Raises CheckpointError."""
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            line("file", name, "must be a plain name of letters, digits, - _ .", "rename it")
        )
    root = os.path.realpath(folder)
    real = os.path.realpath(os.path.join(root, name))
    if os.path.dirname(real) != root and not real.startswith(root + os.sep):
        raise CheckpointError(
            line(name, real, "is a link out of its folder", "copy the file there (cp -L)")
        )
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(
            line(name, folder, "is missing", "get the whole folder again")
        ) from None
    except OSError as error:
        raise CheckpointError(
            line(name, folder, f"cannot be opened ({error.strerror})", "mend it")
        ) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(line(name, folder, "is not a regular file", "remove it"))
        yield descriptor
    finally:
        os.close(descriptor)


def read_bytes(folder: Path, name: str, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The whole file. Raises CheckpointError, also when it is longer than `most_bytes`."""
    with open_file(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > most_bytes:
            raise CheckpointError(
                line(f"{name} bytes", size, f"must be at most {most_bytes}", "use the real file")
            )
        return pread(descriptor, size, 0, name)


def read_json(folder: Path, name: str, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    return parse_object(read_bytes(folder, name, most_bytes), name)


def parse_object(raw: bytes, where: str, most_lists: int = MAX_LISTS) -> dict[str, Any]:
    """The JSON object in `raw`, where every key is there once and every number is finite."""
    if raw.count(b"[") + raw.count(b"{") > most_lists:
        raise CheckpointError(
            line(where, f"{len(raw)} bytes", f"has over {most_lists:,} lists", "use the real file")
        )
    try:
        found = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            line(where, why[:60], "is not sound JSON", "get the file again")
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(
            line(where, type(found).__name__, "must be a JSON object", "get the file again")
        )
    return found


def pread(descriptor: int, num_bytes: int, offset: int, where: str) -> bytes:
    """Exactly `num_bytes` at `offset`. Raises CheckpointError when the file is shorter."""
    found = os.pread(descriptor, num_bytes, offset)
    if len(found) < num_bytes:  # the end of the file, or a read longer than the system does at once
        rest = bytearray(num_bytes - len(found))
        pread_into(descriptor, memoryview(rest), offset + len(found), where)
        found += rest
    return found


def pread_into(descriptor: int, buffer: memoryview, offset: int, where: str) -> None:
    """Fill `buffer` from `offset`. Raises CheckpointError when the file is shorter."""
    # Reads and no map: a map's pages count as this process's memory, and a file that is cut short
    # under a map kills the process.
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [buffer[done:]], offset + done)
        if got == 0:
            raise CheckpointError(
                line(where, f"{offset + done} bytes", "is cut short", "get the file again")
            )
        done += got


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:30]!r} twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value
