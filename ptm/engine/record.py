"""What a rank has committed to its page file: one small record per commit, in two files by turns.

    rank-00003.record-a    magic, format, length | JSON: identity, step, meta |
    rank-00003.record-b    slot of each durable page (uint8) | checksum of each (uint64) | checksum

A record is written in place, over the one before the last, and synced only after all pages that it
names are on the disk. A kill can tear the file being written and never the other, so one whole
record is always there. Both are read at a restart: `RecordLog.read` gives the whole ones and keeps
a line about each that is not. A torn record and one that somebody damaged look alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from ptm.common.errors import CheckpointError
from ptm.engine.disk import File, disk_errors, path_line, sync_folder

FORMAT = 1
MAGIC = b"PTMPAGE\n"
NO_SLOT = 255
"""In place of a slot: the page was never written, it is zeros."""
_HEAD = struct.Struct("<8sII")
_SUM_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose page file it is and how it is laid out; a record of any other is refused."""

    run_id: str
    world: int
    rank: int
    ep: int
    page_bytes: int
    num_pages: int
    durable_start: int
    durable_stop: int
    layout: str
    "Fingerprint of which tensor lies in which page, made by whoever cuts the pages."
    frozen_start: int = 0
    frozen_stop: int = 0
    "Durable pages that are written once, before the first commit, and so have one slot."

    def __post_init__(self) -> None:
        assert self.page_bytes > 0 and self.page_bytes % 4096 == 0, f"{self.page_bytes=}"
        assert 0 <= self.durable_start <= self.durable_stop <= self.num_pages, f"{self}"
        assert not self.frozen or self.frozen[0] in self.durable, f"{self}"
        assert not self.frozen or self.frozen[-1] in self.durable, f"{self}"
        assert 0 <= self.rank < self.world and self.world % self.ep == 0, f"{self}"
        assert self.run_id and not set(self.run_id) & {"/", "\0"}, f"{self.run_id=}"

    @property
    def durable(self) -> range:
        return range(self.durable_start, self.durable_stop)

    @property
    def frozen(self) -> range:
        return range(self.frozen_start, self.frozen_stop)

    @property
    def file_bytes(self) -> int:
        """Two slots for a durable page that may change, one for any other."""
        return (self.num_pages + len(self.durable) - len(self.frozen)) * self.page_bytes

    def offset(self, page: int, slot: int) -> int:
        """Where a slot begins: all slots of the durable pages in order, then the others."""
        first, num_durable = self.durable_start, len(self.durable)
        if page in self.durable:
            ones = min(max(page - self.frozen_start, 0), len(self.frozen))
            assert slot == 0 or page not in self.frozen, f"page {page} has one slot"
            return (2 * (page - first) - ones + slot) * self.page_bytes
        scratch = page if page < first else page - num_durable
        return (2 * num_durable - len(self.frozen) + scratch) * self.page_bytes

    def file(self, ssd_path: str | Path, kind: str) -> Path:
        """The pages, record-a, record-b or lock file of this rank."""
        return rank_file(ssd_path, self.run_id, self.rank, kind)


def rank_file(ssd_path: str | Path, run_id: str, rank: int, kind: str) -> Path:
    return Path(ssd_path) / run_id / f"rank-{rank:05d}.{kind}"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One commit: where the newest content of each durable page is, and what it sums to."""

    identity: Identity
    step: int
    meta: dict[str, Any]
    slots: bytearray
    sums: array[int]


def encode(record: Record) -> bytes:
    head = dataclasses.asdict(record.identity) | {"step": record.step, "meta": record.meta}
    text = json.dumps(head).encode()
    body = _HEAD.pack(MAGIC, FORMAT, len(text)) + text + record.slots + record.sums.tobytes()
    return body + xxhash.xxh3_64_digest(body)


def decode(raw: bytes, path: Path) -> Record:
    """The record in `raw`, read from `path`. Raises CheckpointError for any byte that is wrong."""
    body, digest = raw[:-_SUM_BYTES], raw[-_SUM_BYTES:]
    if xxhash.xxh3_64_digest(body) != digest or not body.startswith(MAGIC):
        rule = "this record of a commit is torn or damaged"
        remedy = "resume from the step before, and look at the disk if no commit was cut short"
        raise CheckpointError(path_line(path, rule, remedy))
    _, version, num_text = _HEAD.unpack_from(body)
    if version != FORMAT:
        rule = f"is written in format {version}, this ptm reads format {FORMAT}"
        raise CheckpointError(path_line(path, rule, "use the ptm that wrote it"))
    end = _HEAD.size + num_text
    head = json.loads(body[_HEAD.size : end])
    step, meta = head.pop("step"), head.pop("meta")
    identity = Identity(**head)
    num_durable = len(identity.durable)
    sums = array("Q", body[end + num_durable :])
    return Record(identity, step, meta, bytearray(body[end : end + num_durable]), sums)


_SETTINGS = {
    "page_bytes": "engine.page_mib",
    "ep": "engine.ep",
    "layout": "model, train.precision, engine.moments and ptm",
    "num_pages": "model and ptm",
}
"""Field of an identity -> what the user set it by."""


def refuse_another(found: Identity, wanted: Identity, path: Path) -> None:
    """Raise CheckpointError naming the first thing in which `found` is not `wanted`."""
    fields = [field.name for field in dataclasses.fields(Identity)]
    for field in sorted(fields, key=lambda name: name != "layout" and name in fields[5:]):
        there, here = getattr(found, field), getattr(wanted, field)
        if there != here:
            rule = f"is of {field}={there}, this run has {field}={here}"
            remedy = "name another engine.ssd_path, or resume with what it was written by"
            if field in _SETTINGS:
                remedy = f"start with the {_SETTINGS[field]} that it was written with"
                remedy += " (SIGTERM then leaves a checkpoint that other settings can read)"
            raise CheckpointError(path_line(path, rule, remedy))


class RecordLog:
    """The two record files of one rank. `read` once before the first `write`."""

    def __init__(
        self,
        ssd_path: str | Path,
        *,
        run_id: str,
        rank: int,
        open_file: Callable[[Path], File] = File,
    ) -> None:
        kinds = ("record-a", "record-b")
        self.paths = [rank_file(ssd_path, run_id, rank, kind) for kind in kinds]
        self.damaged: list[str] = []
        "A line for each record file that could not be used at the last `read`."
        self._steps: dict[Path, int | None] = dict.fromkeys(self.paths)
        self._open_file = open_file

    def read(self) -> list[Record]:
        """All whole records, oldest first. Raises StorageError, and CheckpointError for records in
        another format."""
        found, self.damaged = [], []
        for path in self.paths:
            self._steps[path] = None
            with disk_errors(path, "read"):
                raw = path.read_bytes() if path.exists() else b""
            if not raw:
                continue
            try:
                record = decode(raw, path)
            except CheckpointError as error:
                if "format" in str(error):
                    raise
                self.damaged.append(str(error))
                continue
            self._steps[path] = record.step
            found.append(record)
        return sorted(found, key=lambda record: record.step)

    @property
    def is_empty(self) -> bool:
        """Whether no commit was read or written, not even in part."""
        return not any(path.exists() and os.path.getsize(path) for path in self.paths)

    def find(self, step: int) -> Record:
        """The record of `step`. Raises CheckpointError when it is not there, or not whole."""
        records = self.read()
        for record in records:
            if record.step == step:
                return record
        have = ", ".join(str(record.step) for record in records) or "none"
        rule = "; ".join([f"step {step} is not committed here (there: {have})", *self.damaged])
        remedy = "resume from a step that is there, or from a checkpoint folder"
        raise CheckpointError(path_line(self.paths[0].parent, rule, remedy))

    def write(self, record: Record) -> None:
        """Commit: replace the older of the two records. Raises StorageError."""
        path = min(self.paths, key=lambda path: -1 if (s := self._steps[path]) is None else s)
        raw = encode(record)
        is_new = not path.exists()
        self._steps[path] = None
        with disk_errors(path, "written"):
            file = self._open_file(path)
            try:
                file.write(0, memoryview(raw))
                file.truncate(len(raw))
                file.sync()
            finally:
                file.close()
            if is_new:
                sync_folder(path.parent)
        self._steps[path] = record.step

    def drop_after(self, step: int) -> None:
        """Empty the records of later steps, whose slots will be written again, and damaged ones."""
        for path in self.paths:
            there = self._steps[path]
            if path.exists() and (there is None or there > step) and os.path.getsize(path):
                with disk_errors(path, "written"):
                    file = self._open_file(path)
                    try:
                        file.truncate(0)
                        file.sync()
                    finally:
                        file.close()
                self._steps[path] = None
