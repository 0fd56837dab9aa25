"""One safetensors file, read with distrust and written in a stream.

    8 bytes, length of the header | header, JSON: name -> dtype, shape, byte range | the tensors

The library's own reader takes duplicate names, 300,000 empty tensors and names like `../../x`; this
one does not. Before a tensor is touched the header must be at most 8 MiB with at most 200,000
well-named tensors of known dtypes, whose shapes equal their byte ranges, and the ranges must tile
the rest of the file: no overlap, gap or tail. The bytes themselves are not checked here: a
checkpoint's manifest has their hashes, a published folder has none.

The writer knows every offset beforehand, so a file of any size is written with one piece of one
tensor in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptm.checkpoint.untrusted import open_file, parse_object, pread, pread_into
from ptm.common.errors import CheckpointError, StorageError, line

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 200_000
MAX_DIMS = 8
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,255}")


class Stored(NamedTuple):
    """A tensor of a file; `start` counts bytes from the beginning of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """The header of a file in a folder, checked; and its tensors, read when asked for.

    No descriptor stays open, so a checkpoint of many ranks does not run out of them.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        with open_file(folder, name) as descriptor:
            self.num_bytes = os.fstat(descriptor).st_size
            self.tensors, self.metadata = _read_header(descriptor, self.num_bytes, name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of dim 0 of a tensor, in new memory; all of it by default."""
        stored = self.tensors[name]
        stop = (stored.shape[0] if stored.shape else 1) if stop is None else stop
        shape = (stop - start, *stored.shape[1:]) if stored.shape else ()
        found = torch.empty(shape, dtype=stored.dtype)
        self.read_into(found, name, start, stop)
        return found

    def read_into(self, out: Tensor, name: str, start: int, stop: int) -> None:
        """Fill a contiguous `out` with rows start..stop of a tensor, of the dtype stored."""
        stored = self.tensors[name]
        rows = stored.shape[0] if stored.shape else 1
        assert 0 <= start <= stop <= rows, (name, start, stop, rows)
        row_bytes = stored.num_bytes // rows if rows else 0
        view = as_bytes(out)
        assert len(view) == (stop - start) * row_bytes and out.is_contiguous(), (name, out.shape)
        with open_file(self.folder, self.name) as descriptor:
            if os.fstat(descriptor).st_size != self.num_bytes:
                raise CheckpointError(
                    line("file", self.name, "changed while it was read", "start again")
                )
            pread_into(descriptor, view, stored.start + start * row_bytes, self.name)


class SafetensorsWriter:
    """A new file, written from front to back.

        with SafetensorsWriter(path, {name: (shape, dtype)}) as file:
            for name in file.names:        # the order on disk, widest dtype first
                file.write(name, piece)    # as often as it takes, in the order of the rows

    Leaving the block checks that every byte came, and fsyncs. Raises StorageError.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.names, header = lay_out(tensors, metadata)
        self._left = {
            name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()
        }
        self._dtypes = {name: dtype for name, (_, dtype) in tensors.items()}
        self._next = iter(self.names)
        self._current: str | None = None
        self._path = path
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._put(memoryview(header))

    def write(self, name: str, piece: Tensor) -> None:
        """Append the next rows of `name`, any shape."""
        while self._current is None or self._left[self._current] == 0:
            self._current = next(self._next, None)
            assert self._current is not None, f"{name}: written after the last tensor"
            if self._current == name:
                break
        left = self._left[name] - piece.numel() * piece.dtype.itemsize
        assert self._current == name and left >= 0, (name, self._current, left)
        assert piece.dtype == self._dtypes[name], (name, piece.dtype)
        self._put(as_bytes(piece))
        self._left[name] = left

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                missing = [name for name, left in self._left.items() if left]
                assert not missing, f"{self._path}: not written: {missing[:3]}"
                os.fsync(self._file.fileno())
        except OSError as failure:
            raise _disk(self._path, failure) from failure
        finally:
            self._file.close()

    def _put(self, view: memoryview) -> None:
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as failure:
            raise _disk(self._path, failure) from failure


def lay_out(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[list[str], bytes]:
    """The order of tensors on disk, and the first bytes of their file up to where they begin."""
    # Widest first keeps every tensor aligned to its own item size, as the library does.
    names = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    header: dict[str, Any] = {METADATA: {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in names:
        shape, dtype = tensors[name]
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    assert len(raw) <= MAX_HEADER_BYTES and len(tensors) <= MAX_TENSORS, (names[:1], len(raw))
    return names, len(raw).to_bytes(8, "little") + raw


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable; copies when it is not contiguous."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _read_header(
    descriptor: int, file_bytes: int, file: str
) -> tuple[dict[str, Stored], dict[str, str]]:
    def refuse(what: object, rule: str) -> CheckpointError:
        return CheckpointError(line(file, what, rule, "get the file again"))

    if file_bytes < 8:
        raise refuse(f"{file_bytes} bytes", "is too short for a safetensors file")
    length = int.from_bytes(pread(descriptor, 8, 0, file), "little")
    if length > MAX_HEADER_BYTES:
        raise refuse(f"header of {length} bytes", f"must be at most {MAX_HEADER_BYTES}")
    if 8 + length > file_bytes:
        raise refuse(f"header of {length} bytes", f"is cut short at {file_bytes} bytes")
    header = parse_object(pread(descriptor, length, 8, file), f"{file} header")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse(METADATA, "must map strings to strings")
    if len(header) > MAX_TENSORS:
        raise refuse(f"{len(header)} tensors", f"must be at most {MAX_TENSORS}")

    tensors = {}
    for name, entry in header.items():
        if not _NAME.fullmatch(name):
            raise refuse(f"tensor {name!r}", "must be named with letters, digits, - _ .")
        stored = _stored(entry, first=8 + length)
        if stored is None:
            raise refuse(
                f"tensor {name}", "must have a known dtype, a shape, and as many bytes as these say"
            )
        tensors[name] = stored
    _check_tiling(tensors.items(), 8 + length, file_bytes, refuse)
    return tensors, metadata


def _stored(entry: object, *, first: int) -> Stored | None:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        return None
    if not _counts(shape) or not _counts(offsets) or len(shape) > MAX_DIMS or len(offsets) != 2:
        return None
    stored = Stored(tuple(shape), DTYPES[code], first + offsets[0])
    return stored if stored.num_bytes == offsets[1] - offsets[0] else None


def _counts(values: object) -> bool:
    # type() and not isinstance(): True is an int.
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_tiling(
    tensors: Iterable[tuple[str, Stored]], first: int, file_bytes: int, refuse: Any
) -> None:
    position = first
    for name, stored in sorted(tensors, key=lambda item: (item[1].start, item[1].num_bytes)):
        if stored.start != position:
            kind = "overlaps another" if stored.start < position else "leaves a gap before it"
            raise refuse(f"tensor {name}", kind)
        position += stored.num_bytes
    if position != file_bytes:
        raise refuse(f"{file_bytes} bytes", f"must be {position} as the header says")


def _disk(path: Path, failure: OSError) -> StorageError:
    return StorageError(line("file", path, f"cannot be written ({failure.strerror})", "free space"))
