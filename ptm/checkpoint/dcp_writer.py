"""torch DCP's planner and safetensors writer, for rows that are read when they are written.

DCP agrees on the plan, makes sure that no rows overlap, runs the writes and carries the errors of
any rank to all. It is given write items instead of DTensors: a DTensor of host memory on a mesh of
GPUs would move back to the GPU, and a rank without rows of a tensor would write an empty piece.

Its own writer collects a file in memory, serializes that into a second copy and copies it again,
holding the interpreter lock (0.1 s per 64 MiB). The one here puts the header first, since the plan
has every size, then reads, hashes and writes one tensor after the other: a save needs the memory of
one tensor's rows, and reads each of them once. The files are the same, and DCP's reader reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ptm.checkpoint.manifest import MODEL, Entry
from ptm.checkpoint.safetensors_file import as_bytes, lay_out
from ptm.checkpoint.source import OFFSETS_KEY, SHARDING_KEY
from ptm.engine.state import StateRows

# A file is flushed to the disk when it is whole: small ones keep the disk busy all along.
FILE_BYTES = 64 * 2**20


class RowsPlanner(DefaultSavePlanner):
    """Has DCP write rows of a state; ranks without rows of a tensor write nothing of it."""

    def __init__(self, rows: Mapping[str, StateRows]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._rows = rows

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(n, r) for n, r in self._rows.items() if r.num_rows])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._rows[index.fqn].read()


class ShardWriter(HuggingFaceStorageWriter):
    """One save of one rank. `files`: tensor -> number of its file. `digests` fills as it writes."""

    def __init__(self, path: Path, files: Mapping[str, int]) -> None:
        super().__init__(str(path), fqn_to_index_mapping=dict(files), save_distributed=True)
        self._files = files
        self.digests: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        by_file: dict[int, dict[str, WriteItem]] = {}
        for item in sorted(plan.items, key=lambda item: _order(item.index.fqn)):
            name = item.index.fqn
            by_file.setdefault(self._files[name], {})[name] = item
        last, shard = max(self._files.values()), cast(dict, plan.storage_data)["shard_index"]
        for number, items in by_file.items():
            file = f"shard-{shard:05d}-model-{number:05d}-of-{last:05d}.safetensors"
            self._write_file(self.fs.concat_path(self.path, file), items, planner)
        # Its results would say what lies where; the manifest does, from files read back.
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def _write_file(
        self, path: str | os.PathLike, items: Mapping[str, WriteItem], planner: SavePlanner
    ) -> None:
        parts, offsets = {}, {}
        for name, item in items.items():
            data = cast(TensorWriteData, item.tensor_data)
            parts[name] = (tuple(data.chunk.sizes), data.properties.dtype)
            offsets[name] = {OFFSETS_KEY: list(data.chunk.offsets)}
        names, header = lay_out(parts, {SHARDING_KEY: json.dumps(offsets)})
        with self.fs.create_stream(path, "wb") as stream:
            stream.write(header)
            for name in names:
                rows = cast(Tensor, planner.resolve_data(items[name]))
                found = (tuple(rows.shape), rows.dtype)
                assert found == parts[name], f"{name}: read {found}, planned {parts[name]}"
                view = as_bytes(rows)
                self.digests[name] = xxhash.xxh3_128_hexdigest(view)
                stream.write(view)
                del rows, view  # before the next is read
            stream.flush()
            os.fsync(stream.fileno())


def plan_files(census: Mapping[str, Entry], world: int) -> dict[str, int]:
    """Tensor -> number of its file, from 1; weights and states apart, about FILE_BYTES a rank."""
    numbers: dict[str, int] = {}
    number = filled_bytes = 0
    was_model = None
    for name in sorted(census, key=_order):
        entry = census[name]
        num_bytes = -(-entry.shape[0] // world) * entry.row_bytes
        is_model = name.startswith(MODEL)
        if is_model != was_model or filled_bytes + num_bytes > FILE_BYTES:
            number, filled_bytes = number + 1, 0
        was_model, filled_bytes = is_model, filled_bytes + num_bytes
        numbers[name] = number
    return numbers


def _order(name: str) -> tuple[bool, str, str]:
    # The moments of a parameter follow each other: an engine may have both in one page of a disk.
    is_model = name.startswith(MODEL)
    return not is_model, name if is_model else name.split(".", 2)[-1], name


def _item(name: str, rows: StateRows) -> WriteItem:
    rest = tuple(rows.shape[1:])
    offsets = torch.Size([rows.first_row] + [0] * len(rest))
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size((rows.num_rows, *rest))),
            properties=TensorProperties(dtype=rows.dtype),
            size=torch.Size(rows.shape),
        ),
    )
