"""State rows that lie in one tensor of this process: what the engines over FSDP2 and DeepSpeed show
of their states (ptm/engine/state.py has the protocol and the names)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptm.engine.state import row_numel, stored_shape


@dataclass(frozen=True)
class TensorRows:
    """Rows [first_row, first_row + num_rows) of a tensor of `shape`, held in `values`."""

    shape: tuple[int, ...]
    first_row: int
    num_rows: int
    values: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def read(self) -> Tensor:
        rows = self.values.detach().reshape(self.num_rows, *self.shape[1:])
        return rows.cpu().contiguous()

    @torch.no_grad()
    def write(self, rows: Tensor) -> None:
        self.values.copy_(rows.reshape(self.values.shape))


def rows_of(values: Tensor, shape: Sequence[int], first_numel: int) -> TensorRows:
    """`values`, a contiguous range that begins at element `first_numel` of a parameter of that
    shape."""
    per_row = row_numel(shape)
    assert first_numel % per_row == 0 and values.numel() % per_row == 0, (shape, first_numel)
    first, num = first_numel // per_row, values.numel() // per_row
    return TensorRows(stored_shape(shape), first, num, values)
