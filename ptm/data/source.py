"""Which files a source has, and how they are cut into pieces that can be read in parallel.

A source is a folder, a glob, a file, or `python_stdlib`. Files are ordered by their path below the
source's root, so the corpus does not depend on the order a disk lists them in.

    .txt, .py                     one document a file         pieces: the file
    .jsonl                        one document a line         pieces: byte ranges
    .jsonl.gz, .jsonl.zst         one document a line         pieces: the file
    .parquet                      one document a row          pieces: row groups

Files that cannot be used at all (a broken link, a link loop, a pipe) are listed with the reason, so
that they are counted as bad rows and not left out in silence. Reading is ptm/data/reader.py's work.
"""

from __future__ import annotations

import errno
import glob
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ptm.common.errors import DataError, line
from ptm.data.config import PYTHON_STDLIB

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


class File(NamedTuple):
    """One file; `name` is its path below the source's root, `broken` says why it cannot be read."""

    name: str
    path: str
    suffix: str
    size_bytes: int
    mtime_ns: int
    broken: str = ""


class Piece(NamedTuple):
    """From `start` to `stop`: bytes of a .jsonl, row groups of a .parquet, else (0, -1)."""

    file: File
    start: int
    stop: int
    size_bytes: int


def find(source: str, key: str = "data.source") -> list[File]:
    """The files of a source, ordered by name; `key` is the recipe's that names it.

    Raises: DataError when there is none.
    """
    refuse_missing(source, key)
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        outside = {"site-packages", "dist-packages", "__pycache__"}
        paths = [p for p in root.rglob("*.py") if not outside & set(p.relative_to(root).parts)]
        files = [_stat(p, p.relative_to(root).as_posix(), ".py") for p in paths]
        files = [f for f in files if f.size_bytes]  # the many empty __init__.py
    elif os.path.isdir(source):
        files = list(_walk(Path(source), "", frozenset()))
    else:
        # A file name may hold [ or *, so it is tried as it stands before it is a pattern.
        names = [source] if os.path.lexists(source) else glob.glob(source, recursive=True)
        files = [f for name in names for f in _named(Path(name))]
    if not files:
        raise _nothing(source, key, f"holds no file ending in {', '.join(SUFFIXES)}")
    return sorted(files)


def refuse_missing(source: str, key: str = "data.source") -> None:
    """Raise DataError where a source is the path of nothing."""
    if source != PYTHON_STDLIB and not glob.has_magic(source) and not os.path.lexists(source):
        raise _nothing(source, key, "does not exist")


def _nothing(source: str, key: str, rule: str) -> DataError:
    other = PYTHON_STDLIB if key == "data.source" else "tasks"
    return DataError(line(key, source, rule, f"name a folder, a glob or {other}"))


def cut(files: list[File], target_bytes: int) -> Iterator[Piece]:
    """Pieces of about `target_bytes` where the format allows it, in the order of the files."""
    for file in files:
        if file.suffix == ".jsonl" and not file.broken:
            starts = range(0, max(file.size_bytes, 1), target_bytes)
            for start in starts:
                stop = min(start + target_bytes, file.size_bytes)
                yield Piece(file, start, stop, stop - start)
        elif file.suffix == ".parquet" and not file.broken:
            start = held = 0
            sizes = _row_group_bytes(file)
            for i, size in enumerate(sizes, start=1):
                held += size
                if held >= target_bytes or i == len(sizes):
                    yield Piece(file, start, i, held)
                    start, held = i, 0
        else:
            yield Piece(file, 0, -1, file.size_bytes)


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[File]:
    # Linked folders are followed (people keep data elsewhere), but not into a folder that is open.
    info = folder.stat()
    above |= {(info.st_dev, info.st_ino)}
    for entry in os.scandir(folder):
        name, path = prefix + entry.name, Path(entry.path)
        if not os.path.isdir(path):  # also a broken link
            yield from _named(path, name)
        elif (entry.stat().st_dev, entry.stat().st_ino) in above:
            yield File(name, str(path), "", 0, 0, "symbolic link loop")
        else:
            yield from _walk(path, name + "/", above)


def _named(path: Path, name: str | None = None) -> Iterator[File]:
    # A broken link is listed whatever its suffix: it stands for something the user wants read.
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix or not os.path.exists(path):
        yield _stat(path, name or path.as_posix(), suffix or "")


def _stat(path: Path, name: str, suffix: str) -> File:
    try:
        info = path.stat()
    except OSError as e:
        why = "symbolic link loop" if e.errno == errno.ELOOP else f"cannot be opened: {e.strerror}"
        return File(name, str(path.absolute()), suffix, 0, 0, why)
    broken = "" if path.is_file() else "not a regular file"
    return File(name, str(path.absolute()), suffix, info.st_size, info.st_mtime_ns, broken)


def _row_group_bytes(file: File) -> list[int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file.path)
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError):
        sizes = []  # damaged: the reader says how
    return sizes or [file.size_bytes]
