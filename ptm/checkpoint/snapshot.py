"""A copy of this rank's rows of the state in host memory.

The copy is what makes a background save exact: training may change the live state as soon as `copy`
returns. Buffers are allocated once and written over at each save, so a save allocates nothing in
the middle of a run; they cost as much host memory as the rank's share of the state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptm.checkpoint.rows import TensorRows, settle
from ptm.engine.state import StateRows


class Snapshot:
    """Host buffers for the state of this rank. Used by the thread that trains."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def prepare(self, state: Mapping[str, StateRows]) -> None:
        """Allocate the buffers and touch them, so that the first copy is as short as others."""
        for name, rows in state.items():
            self._buffer(name, rows).zero_()

    def copy(self, state: Mapping[str, StateRows]) -> dict[str, StateRows]:
        """The same rows, frozen as they are now; those of the copy before are written over."""
        found: dict[str, StateRows] = {}
        for name, rows in state.items():
            buffer = self._buffer(name, rows)
            if rows.num_rows:
                live = rows.rows_RX if isinstance(rows, TensorRows) else rows.read()
                buffer.copy_(live, non_blocking=True)
            found[name] = TensorRows(buffer, rows.first_row, tuple(rows.shape))
        settle(state)
        return found

    def _buffer(self, name: str, rows: StateRows) -> Tensor:
        shape = (rows.num_rows, *rows.shape[1:])
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape or buffer.dtype != rows.dtype:
            is_cuda = isinstance(rows, TensorRows) and rows.rows_RX.is_cuda
            buffer = torch.empty(shape, dtype=rows.dtype, pin_memory=is_cuda)
            self._buffers[name] = buffer
        return buffer
