"""How an engine shows its states to whoever saves, loads or converts them.

Every tensor of the state is, on one rank, some contiguous rows. They may live in memory, on a disk
or on an accelerator, so they are read and written when asked for, a tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class StateRows(Protocol):
    """This rank's rows of one tensor. `shape` is the whole tensor's as it is stored, rows first."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def first_row(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor:
        """(num_rows, *shape[1:]) on the CPU, contiguous; a copy, or a view of live memory."""
        ...

    def write(self, rows: Tensor) -> None:
        """Replace the rows by `rows`, of the shape and dtype that `read` gives."""
        ...


def stored_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape under which a parameter is cut, saved and loaded: stacked matrices (E, R, C) as
    (E x R, C), anything else as it is. The first dim counts the rows."""
    if len(shape) == 3:
        return (shape[0] * shape[1], shape[2])
    return tuple(shape)


def row_numel(shape: Sequence[int]) -> int:
    """Elements of one row of a parameter of that shape."""
    return math.prod(stored_shape(shape)[1:])
