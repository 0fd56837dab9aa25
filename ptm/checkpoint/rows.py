"""What a save and a load see of the state: on each rank, some contiguous rows of each tensor.

An engine hands out `StateRows` (ptm/engine/state.py), whose rows may live on a disk. Tensors in
memory, plain or DTensor, are seen through `TensorRows`, which is one. Ranges need not be equal, and
a rank may have no row of a tensor; all ranks together have every row once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ptm.checkpoint.manifest import Entry, entry_of
from ptm.checkpoint.safetensors_file import as_bytes
from ptm.engine.state import StateRows, stored_shape


@dataclass(frozen=True)
class TensorRows:
    """Rows of a tensor that are in memory, of the host or of a device; `rows_RX` shares it."""

    rows_RX: Tensor
    first_row: int
    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return len(self.rows_RX)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows_RX.dtype

    def read(self) -> Tensor:
        return self.rows_RX.cpu().contiguous()

    def write(self, rows: Tensor) -> None:
        self.rows_RX.copy_(rows)


def as_rows(state: Mapping[str, StateRows | Tensor]) -> dict[str, StateRows]:
    """The state with its tensors wrapped: each a DTensor, Shard(0) over a mesh of one axis, or
    plain in a world of one."""
    return {n: _wrap(value) if isinstance(value, Tensor) else value for n, value in state.items()}


def settle(state: Mapping[str, StateRows]) -> None:
    """Wait for what the device of a tensor still has to do: another thread reads it next."""
    if any(isinstance(r, TensorRows) and r.rows_RX.is_cuda for r in state.values()):
        torch.cuda.synchronize()


def entry(rows: StateRows) -> Entry:
    return entry_of(rows.shape, rows.dtype)


def digest(rows: StateRows) -> str:
    """The hash of this rank's rows, as a manifest has it."""
    return xxhash.xxh3_128_hexdigest(as_bytes(rows.read()))


def is_stored_as(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Are these shapes of one tensor, stacked matrices (E, R, C) in either of their two forms?"""
    return a == b or stored_shape(a) == b or a == stored_shape(b)


def _wrap(tensor: Tensor) -> TensorRows:
    tensor = tensor.detach()
    assert tensor.dim() > 0, "a scalar has no rows: give it the shape (1,)"
    if not isinstance(tensor, DTensor):
        return TensorRows(tensor, 0, tuple(tensor.shape))
    is_rows = tensor.placements == (Shard(0),)
    assert is_rows, f"{tensor.placements}: must be Shard(0) on one axis"
    chunk = tensor.__create_chunk_list__()[0]
    local = tensor.to_local()
    assert local.shape == chunk.sizes, (local.shape, chunk)
    return TensorRows(local, chunk.offsets[0], tuple(tensor.shape))
