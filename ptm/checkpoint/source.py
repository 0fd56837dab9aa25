"""Where tensors come from: a seam, and what implements it.

    FolderSource    the safetensors files of a folder; a tensor may lie in shards over several files
    RowsSource      tensors made of the rows of another source's, under other names
    stream()        one such tensor piece by piece, for a copy in bounded memory

Shards are those of torch's HuggingFaceStorageWriter(save_distributed=True), cut along dim 0: a file
holds at most one shard of a tensor, and its header's metadata says at which row the shard begins. A
published folder is the same thing with every tensor in one shard. Shards that do not tile the rows
of their tensor are refused, so no element is ever made up or taken twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ptm.checkpoint.safetensors_file import MAX_TENSORS, SafetensorsFile
from ptm.checkpoint.untrusted import parse_object
from ptm.common.errors import CheckpointError, line
from ptm.engine.state import StateRows
from ptm.model.hf_names import Piece, Rows

PIECE_BYTES = 64 * 2**20
SHARDING_KEY, OFFSETS_KEY = "DCP_SHARDING_INFO", "saved_offsets"  # torch's words


class TensorInfo(NamedTuple):
    """What a tensor is before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of dim 0, in new memory; the whole tensor by default."""
        ...


class _Shard(NamedTuple):
    first_row: int
    num_rows: int
    file: SafetensorsFile


class FolderSource:
    """The tensors of some safetensors files of a folder, assembled from their shards.

    Raises CheckpointError, naming file and tensor, unless every row of a tensor is there once.
    """

    def __init__(self, folder: Path, files: list[str]) -> None:
        self._shards: dict[str, list[_Shard]] = {}
        for name in sorted(files):
            file = SafetensorsFile(folder, name)
            first_rows = _first_rows(file)
            for tensor, stored in file.tensors.items():
                rows = stored.shape[0] if stored.shape else 1
                shard = _Shard(first_rows.get(tensor, 0), rows, file)
                self._shards.setdefault(tensor, []).append(shard)
            if len(self._shards) > MAX_TENSORS:
                rule = f"makes over {MAX_TENSORS} tensors"
                raise CheckpointError(line("file", name, rule, "get the folder of one model"))
        self._info = {name: _assemble(name, shards) for name, shards in self._shards.items()}

    def names(self) -> list[str]:
        return list(self._info)

    def info(self, name: str) -> TensorInfo:
        return self._info[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        shape, dtype = self._info[name]
        shards = self._shards[name]
        if len(shards) == 1:
            return shards[0].file.read(name, start, stop)
        stop = shape[0] if stop is None else stop
        out = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        for first_row, num_rows, file in shards:
            first, last = max(start, first_row), min(stop, first_row + num_rows)
            if first < last:
                rows = out[first - start : last - start]
                file.read_into(rows, name, first - first_row, last - first_row)
        return out

    def files_of(self, name: str) -> list[str]:
        """The files that hold a tensor, in the order of its rows."""
        return [shard.file.name for shard in self._shards[name]]


class RowsSource:
    """A source under other names, each tensor being rows of `source`'s.

    Shapes were compared by `check_shapes`; raises CheckpointError where parts differ in dtype.
    """

    def __init__(self, source: TensorSource, tensors: Mapping[str, Rows]) -> None:
        self._source, self._tensors = source, tensors
        for name, (_, pieces) in tensors.items():
            if len({source.info(piece.name).dtype for piece in pieces}) > 1:
                raise CheckpointError(
                    line("tensor", name, "has parts of several dtypes", "convert them to one")
                )

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        shape, pieces = self._tensors[name]
        return TensorInfo(shape, self._source.info(pieces[0].name).dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        shape, dtype = self.info(name)
        stop = shape[0] if stop is None else stop
        out = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        flat, position = out.view(-1), -start * math.prod(shape[1:])  # of the next piece, in flat
        for piece in self._tensors[name].pieces:
            row_numel = math.prod(self._source.info(piece.name).shape[1:])
            numel = (piece.stop - piece.start) * row_numel
            first, last = max(0, -position), min(numel, len(flat) - position)
            if first < last:
                assert first % row_numel == last % row_numel == 0, (name, start, stop, piece)
                rows = self._source.read(
                    piece.name, piece.start + first // row_numel, piece.start + last // row_numel
                )
                flat[position + first : position + last] = rows.view(-1)
            position += numel
        return out


def all_rows(source: TensorSource, name: str) -> Rows:
    """A tensor as rows of itself."""
    shape = source.info(name).shape
    return Rows(shape, (Piece(name, 0, shape[0] if shape else 1),))


def read_rows(source: TensorSource, name: str, rows: StateRows) -> Tensor:
    """The rows of `source`'s tensor `name` that `rows` has, in its shape and the dtype stored.

    Stacked matrices may be (E, R, C) in one and (E x R, C) in the other. Only these rows are read,
    or, cut out of the middle of a matrix in a source that has them stacked, all of that matrix.
    """
    shape = source.info(name).shape
    ours = math.prod(rows.shape[1:])
    per_row = math.prod(shape[1:])
    first, last = rows.first_row * ours, (rows.first_row + rows.num_rows) * ours  # in elements
    start = first // per_row
    found = source.read(name, start, -(-last // per_row)).view(-1)
    found = found[first - start * per_row : last - start * per_row]
    return found.view(rows.num_rows, *rows.shape[1:])


def stream(source: TensorSource, tensor: Rows, piece_bytes: int = PIECE_BYTES) -> Iterator[Tensor]:
    """The elements of `tensor` in order, in pieces of `piece_bytes` or of one row of `source`'s."""
    for name, start, stop in tensor.pieces:
        shape, dtype = source.info(name)
        step = max(1, piece_bytes // max(1, math.prod(shape[1:]) * dtype.itemsize))
        for row in range(start, stop, step):
            yield source.read(name, row, min(row + step, stop))


def check_shapes(
    source: TensorSource, expected: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Raise CheckpointError unless `source` has exactly these tensors in these shapes."""
    found = set(source.names())
    remedy = "get the whole folder of this model"
    for names, rule in ((expected.keys() - found, "missing"), (found - expected.keys(), "unknown")):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            rule = f"is {rule} in {where}{more}"
            raise CheckpointError(line("tensor", min(names), rule, remedy))
    for name, shape in expected.items():
        if source.info(name).shape != shape:
            rule = f"has shape {source.info(name).shape} in {where} and needs {shape}"
            raise CheckpointError(line("tensor", name, rule, remedy))


def _first_rows(file: SafetensorsFile) -> dict[str, int]:
    raw = file.metadata.get(SHARDING_KEY)
    if raw is None:
        return {}
    found = {}
    for name, entry in parse_object(
        raw.encode("utf-8", "replace"), f"{file.name} {SHARDING_KEY}"
    ).items():
        offsets = entry.get(OFFSETS_KEY) if isinstance(entry, dict) else None
        dims = len(file.tensors[name].shape) if name in file.tensors else -1
        if (
            not isinstance(offsets, list)
            or len(offsets) != dims
            or not all(type(o) is int and 0 <= o < 2**63 for o in offsets)
        ):
            rule = "is not the place of a shard of this file"
            raise CheckpointError(line(f"{file.name} {SHARDING_KEY}", name, rule, "save it again"))
        if any(offsets[1:]):
            rule = "is cut along another dim than 0"
            raise CheckpointError(line(f"{file.name} tensor", name, rule, "save it by rows"))
        found[name] = offsets[0] if offsets else 0
    return found


def _assemble(name: str, shards: list[_Shard]) -> TensorInfo:
    shards.sort(key=lambda shard: (shard.first_row, shard.num_rows))
    row, before = 0, shards[0]
    first = before.file.tensors[name]
    for shard in shards:
        stored = shard.file.tensors[name]
        files = f"{before.file.name} and {shard.file.name}"
        if (stored.dtype, stored.shape[1:]) != (first.dtype, first.shape[1:]):
            raise CheckpointError(line("tensor", name, f"differs between {files}", "save it again"))
        if shard.first_row != row:
            rule = f"is twice in {files}" if shard.first_row < row else f"lacks row {row}"
            raise CheckpointError(line("tensor", name, rule, "get the whole folder again"))
        row, before = row + shard.num_rows, shard
    return TensorInfo((row, *first.shape[1:]) if first.shape else (), first.dtype)
