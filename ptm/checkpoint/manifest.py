"""The checkpoint format, on one page.

    step-00000120/
      shard-00001-model-00001-of-00002.safetensors    rank 1's rows of some tensors, weights
      shard-00001-model-00002-of-00002.safetensors    rank 1's rows of others, optimizer states
      shard-00002-...                                 rank 2's (a converted folder names its own)
      tokenizer/tokenizer.json                        attachments: files, at most one folder deep
      manifest.json                                   written last; nothing else may be there

A tensor is named `model.<parameter>`, `optim.exp_avg.<parameter>` or `optim.exp_avg_sq.<parameter>`
in files and manifest alike. It is cut along dim 0 into pieces that cover its rows exactly once; a
piece lies in one file. The manifest lists

    format_version, needs_ptm     needs_ptm: the oldest ptm that reads this version
    step, run_id, world, is_best  holds: training (weights and optimizer states) | weights
    meta                          the run's own counters and model section, any JSON
    census                        tensor -> shape, dtype (as safetensors spells it)
    files                         file -> size, size and hash of its header, pieces: tensor ->
                                  first_row, num_rows, start (byte in the file), xxh3_128
    attachments                   path -> size, xxh3_128
    xxh3_128                      of all of the above, in the very bytes that `Manifest.dump` makes

so every byte of the folder is under a hash, the manifest's own included: a file that parses to the
same values but is written otherwise is refused. These hashes find damage, not malice: whoever can
write the folder can make new ones. The last rule and the first two keys are promised for all
versions, so that an old ptm can tell "newer" from "damaged". To look at one: python -m json.tool.
"""

from __future__ import annotations

import json
import math
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import xxhash

from ptm.checkpoint.safetensors_file import CODES, DTYPES, SafetensorsFile
from ptm.checkpoint.untrusted import open_file, parse_object, pread, read_bytes
from ptm.common.errors import CheckpointError, line

FILE = "manifest.json"
VERSION = 1
NEEDS_PTM = "0.1.0"
TRAINING, WEIGHTS = "training", "weights"
MODEL, OPTIM = "model.", "optim."
MOST_BYTES = 256 * 2**20
_HASH = "xxh3_128"
_TENSOR = re.compile(r"(model|optim\.[a-z_]+)\.[A-Za-z0-9_][A-Za-z0-9_.\-]{0,239}")
_PLAIN = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}"
_SHARD_FILE = re.compile(_PLAIN + r"\.safetensors")
_ATTACHMENT = re.compile(rf"({_PLAIN}/)?{_PLAIN}")
_DIGEST = re.compile(r"[0-9a-f]{32}")

K = TypeVar("K")


class NewerFormat(CheckpointError):
    """A sound manifest of a format this ptm does not know: to be kept, not stepped over."""


class Entry(NamedTuple):
    """A whole tensor, as the census knows it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.torch_dtype.itemsize


class Piece(NamedTuple):
    """Rows of a tensor in one file; `start` counts bytes from the beginning of the file."""

    first_row: int
    num_rows: int
    start: int
    xxh3_128: str


class ShardFile(NamedTuple):
    """One safetensors file; the header's size and hash include its 8 bytes of length."""

    size_bytes: int
    header_bytes: int
    header_xxh3_128: str
    pieces: dict[str, Piece]


class Attachment(NamedTuple):
    """A file that goes with the checkpoint, such as the tokenizer's."""

    size_bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint folder holds. Made by a save, a conversion, or `read`.

    Raises: CheckpointError when made from parts that contradict each other.
    """

    step: int
    run_id: str
    world: int
    holds: str
    census: dict[str, Entry]
    files: dict[str, ShardFile]
    attachments: dict[str, Attachment] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    is_best: bool = False

    def __post_init__(self) -> None:
        check(self)

    @property
    def num_bytes(self) -> int:
        parts = [*self.files.values(), *self.attachments.values()]
        return sum(part.size_bytes for part in parts)

    def pieces(self, name: str) -> list[tuple[str, Piece]]:
        """(file, piece) of one tensor, in the order of its rows."""
        found = [(f, file.pieces[name]) for f, file in self.files.items() if name in file.pieces]
        return sorted(found, key=lambda pair: pair[1].first_row)

    def dump(self) -> bytes:
        """The text of manifest.json."""
        values: dict[str, Any] = {"format_version": VERSION, "needs_ptm": NEEDS_PTM}
        values |= {name: getattr(self, name) for name in _KEYS if name not in _TABLES}
        values["census"] = {n: entry._asdict() for n, entry in self.census.items()}
        values["attachments"] = {n: file._asdict() for n, file in self.attachments.items()}
        values["files"] = {
            n: file._asdict() | {"pieces": {t: p._asdict() for t, p in file.pieces.items()}}
            for n, file in self.files.items()
        }
        return _text(values | {_HASH: _digest(values)})


_KEYS = tuple(Manifest.__dataclass_fields__)
_TABLES = ("census", "files", "attachments")


def write(folder: Path, manifest: Manifest) -> None:
    """Put manifest.json into `folder`, which must have none, and fsync it. Raises OSError."""
    write_file(folder / FILE, manifest.dump())


def write_file(path: Path, raw: bytes) -> None:
    """A new small file, on the disk when this returns. Raises OSError."""
    with open(path, "xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, whole and free of contradictions; no other file is read.

    Raises: CheckpointError; NewerFormat when it is sound but from a newer ptm.
    """
    raw = read_bytes(folder, FILE, MOST_BYTES)
    values = parse_object(raw, f"{folder}/{FILE}")
    if raw != _text(values) or values.pop(_HASH, None) != _digest(values):
        rule = "is damaged: its own hash does not match"
        raise CheckpointError(line(f"{folder}", FILE, rule, "use another checkpoint"))
    version, needs = values.pop("format_version", None), values.pop("needs_ptm", None)
    if type(version) is not int or version < 1:
        raise _refused(folder, "format_version", version, "must be a count from 1")
    if version > VERSION:
        rule = f"this ptm reads up to {VERSION}"
        raise NewerFormat(
            line(f"{folder} format_version", version, rule, f"use ptm {needs} or newer")
        )
    return _parse(folder, values)


def describe(file: SafetensorsFile, pieces: Mapping[str, tuple[int, str]]) -> ShardFile:
    """The entry of a file just written; pieces: tensor -> (first row, xxh3_128 of its bytes).

    Raises: CheckpointError if the file does not hold exactly these tensors.
    """
    if pieces.keys() != file.tensors.keys():
        odd = sorted(pieces.keys() ^ file.tensors.keys())[0]
        raise CheckpointError(
            line(f"{file.folder}/{file.name}", odd, "was not saved or not asked for", "save again")
        )
    header = read_header(file)
    found = {
        name: Piece(first_row, file.tensors[name].shape[0], file.tensors[name].start, digest)
        for name, (first_row, digest) in pieces.items()
    }
    return ShardFile(file.num_bytes, len(header), xxhash.xxh3_128_hexdigest(header), found)


def read_header(file: SafetensorsFile) -> bytes:
    """The first bytes of a file up to its tensors."""
    header_bytes = min((t.start for t in file.tensors.values()), default=file.num_bytes)
    with open_file(file.folder, file.name) as descriptor:
        return pread(descriptor, header_bytes, 0, file.name)


def entry_of(shape: Iterable[int], dtype: torch.dtype) -> Entry:
    return Entry(tuple(shape), CODES[dtype])


def check(manifest: Manifest) -> None:
    """Raise CheckpointError unless names are plain and every row of every tensor is there once."""
    for name, entry in manifest.census.items():
        if not _TENSOR.fullmatch(name):
            raise _bad(name, "is no tensor name: model.* or optim.<state>.*")
        if entry.dtype not in DTYPES or not 1 <= len(entry.shape) <= 8 or 0 in entry.shape:
            raise _bad(name, f"cannot be {entry.dtype} {list(entry.shape)}")
        if manifest.holds == WEIGHTS and not name.startswith(MODEL):
            raise _bad(name, "is no weight, in a checkpoint of weights only")
    if manifest.holds not in (TRAINING, WEIGHTS) or not manifest.census:
        raise _bad(manifest.holds, "must be training or weights, with at least one tensor")
    rows: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.census}
    for file_name, file in manifest.files.items():
        if not _SHARD_FILE.fullmatch(file_name):
            raise _bad(file_name, "is no plain name of a .safetensors file")
        _check_file(manifest.census, file_name, file)
        for name, piece in file.pieces.items():
            rows[name].append((piece.first_row, piece.num_rows))
    for name, found in rows.items():
        check_cover(name, manifest.census[name].shape[0], found)
    for name, attached in manifest.attachments.items():
        if not _ATTACHMENT.fullmatch(name) or name == FILE or _SHARD_FILE.fullmatch(name):
            raise _bad(name, "is no plain name of an attachment")
        if not _DIGEST.fullmatch(attached.xxh3_128):
            raise _bad(name, "has no sound hash")


def _check_file(census: dict[str, Entry], file_name: str, file: ShardFile) -> None:
    position = file.header_bytes
    for name, piece in sorted(file.pieces.items(), key=lambda item: item[1].start):
        if name not in census:
            raise _bad(name, f"is in {file_name} but not in the census")
        if piece.start != position or piece.num_rows < 1:
            raise _bad(name, f"does not follow the tensor before it in {file_name}")
        if not _DIGEST.fullmatch(piece.xxh3_128):
            raise _bad(name, f"has no sound hash in {file_name}")
        position += piece.num_rows * census[name].row_bytes
    if position != file.size_bytes or not file.pieces:
        raise _bad(file_name, f"has {file.size_bytes} bytes, its tensors say {position}")


def check_cover(name: str, num_rows: int, found: Iterable[tuple[int, int]]) -> None:
    """Raise CheckpointError unless (first_row, num_rows) pairs cover num_rows rows exactly once."""
    position = 0
    for first, count in sorted(found):
        if first != position:
            twice = "twice" if first < position else "nowhere"
            raise _bad(name, f"has row {min(first, position)} {twice}")
        position += count
    if position != num_rows:
        raise _bad(name, f"has rows up to {position} of {num_rows}")


def _bad(what: object, rule: str) -> CheckpointError:
    return CheckpointError(line("checkpoint", what, rule, "save again or use another checkpoint"))


def _refused(folder: Path, key: str, value: object, rule: str) -> CheckpointError:
    return CheckpointError(line(f"{folder}/{FILE} {key}", value, rule, "use another checkpoint"))


def _text(values: dict[str, Any]) -> bytes:
    # No indent: with one, json leaves its C encoder, and 500,000 pieces take ten seconds.
    text = json.dumps(values, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def _digest(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_text(values))


def _parse(folder: Path, values: dict[str, Any]) -> Manifest:
    if values.keys() != set(_KEYS):
        odd = sorted(values.keys() ^ set(_KEYS))[0]
        raise _refused(folder, odd, "missing or unknown", "must be a key of this format")
    for key, kind in (("step", int), ("world", int), ("run_id", str), ("holds", str)):
        if type(values[key]) is not kind:
            raise _refused(folder, key, values[key], f"must be {kind.__name__}")
    for key in ("meta", *_TABLES):
        if type(values[key]) is not dict:
            raise _refused(folder, key, values[key], "must be an object")
    if type(values["is_best"]) is not bool or values["step"] < 0 or values["world"] < 1:
        raise _refused(
            folder, "step", values["step"], "must be a count, world from 1, is_best a bool"
        )
    values["census"] = _table(folder, Entry, values["census"])
    values["attachments"] = _table(folder, Attachment, values["attachments"])
    files = _table(folder, ShardFile, values["files"])
    values["files"] = {
        n: f._replace(pieces=_table(folder, Piece, f.pieces)) for n, f in files.items()
    }
    return Manifest(**values)


def _table(folder: Path, kind: type[K], found: dict[str, Any]) -> dict[str, K]:
    types = typing.get_type_hints(kind)
    made = {}
    for name, row in found.items():
        if not isinstance(row, dict) or row.keys() != types.keys():
            raise _refused(folder, name, row, f"must have {', '.join(types)}")
        for key, value in row.items():
            row[key] = _value(folder, f"{name} {key}", value, types[key])
        made[name] = kind(**row)
    return made


def _value(folder: Path, key: str, value: Any, wanted: Any) -> Any:
    # type() and not isinstance(): True is an int.
    if wanted == tuple[int, ...]:
        if type(value) is list and all(type(n) is int and 0 <= n < 2**48 for n in value):
            return tuple(value)
    elif type(value) is (typing.get_origin(wanted) or wanted) and (
        type(value) is not int or 0 <= value < 2**60
    ):
        return value
    raise _refused(folder, key, value, f"must be {getattr(wanted, '__name__', wanted)} in range")
