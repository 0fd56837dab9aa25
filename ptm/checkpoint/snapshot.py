"""A copy of this rank's rows of the state in host memory, and torch DCP's view of it.

The copy is what makes a background save exact: training may change the live tensors as soon as
`take` returns. Buffers are allocated at the first save and written over at each later one, so a
save allocates nothing in the middle of a run; they cost as much host memory as the rank's share of
the state.

DCP is given write items instead of DTensors: a DTensor of host memory on a mesh of GPUs would move
back to the GPU, and a rank without rows of a tensor would write an empty piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor, Shard

from ptm.checkpoint.manifest import MODEL, Entry, entry_of
from ptm.checkpoint.safetensors_file import as_bytes

# torch's writer builds a file in memory and holds the interpreter lock, 0.1 s per 64 MiB (2026-11,
# 2 cores of an EPYC): the training thread starts nothing meanwhile, so files are kept this small.
FILE_BYTES = 64 * 2**20


class Rows(NamedTuple):
    """This rank's rows of one tensor: rows_RX (rows, ...) contiguous in host memory."""

    rows_RX: Tensor
    first_row: int
    shape: tuple[int, ...]

    @property
    def entry(self) -> Entry:
        return entry_of(self.shape, self.rows_RX.dtype)

    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(as_bytes(self.rows_RX))


class Snapshot:
    """Host buffers for the state of this rank. `take` is called by the thread that trains."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: Mapping[str, Tensor], *, is_copy: bool) -> dict[str, Rows]:
        """This rank's rows by name, copied; with is_copy=False those in host memory are lent.

        Shapes: each tensor a DTensor, Shard(0) over a mesh of one axis; or plain in a world of one.
        """
        found = {}
        for name, tensor in state.items():
            local, first_row = local_rows(tensor)
            if is_copy or local.device.type != "cpu" or not local.is_contiguous():
                local = self._copy(name, local)
            found[name] = Rows(local, first_row, tuple(tensor.shape))
        if any(tensor.device.type == "cuda" for tensor in state.values()):
            torch.cuda.synchronize()
        return found

    def _copy(self, name: str, local: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            is_cuda = local.device.type == "cuda"
            buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(local, non_blocking=True)


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """(this rank's rows of `tensor`, sharing its memory; the first one's number)."""
    tensor = tensor.detach()
    assert tensor.dim() > 0, "a scalar has no rows: give it the shape (1,)"
    if not isinstance(tensor, DTensor):
        return tensor, 0
    is_rows = tensor.placements == (Shard(0),)
    assert is_rows, f"{tensor.placements}: must be Shard(0) on one axis"
    chunk = tensor.__create_chunk_list__()[0]
    local = tensor.to_local()
    assert local.shape == chunk.sizes, (local.shape, chunk)
    return local, chunk.offsets[0]


class RowsPlanner(DefaultSavePlanner):
    """Has DCP write the rows of a snapshot; ranks without rows of a tensor write nothing of it."""

    def __init__(self, rows: Mapping[str, Rows]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._rows = rows

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(n, r) for n, r in self._rows.items() if len(r.rows_RX)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._rows[index.fqn].rows_RX


def _item(name: str, rows: Rows) -> WriteItem:
    offsets = torch.Size([rows.first_row] + [0] * (len(rows.shape) - 1))
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=rows.rows_RX.shape),
            properties=TensorProperties(dtype=rows.rows_RX.dtype),
            size=torch.Size(rows.shape),
        ),
    )


def plan_files(census: Mapping[str, Entry], world: int) -> dict[str, int]:
    """Tensor -> number of its file, from 1; weights and states apart, about FILE_BYTES a rank."""
    numbers: dict[str, int] = {}
    number = filled_bytes = 0
    was_model = None
    for name in sorted(census):
        entry = census[name]
        num_bytes = -(-entry.shape[0] // world) * entry.row_bytes
        is_model = name.startswith(MODEL)
        if is_model != was_model or filled_bytes + num_bytes > FILE_BYTES:
            number, filled_bytes = number + 1, 0
        was_model, filled_bytes = is_model, filled_bytes + num_bytes
        numbers[name] = number
    return numbers
