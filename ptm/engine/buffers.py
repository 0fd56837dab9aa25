"""Persistent buffers of the model, such as the router's bias: small, equal on all ranks, and part
of the state.

Rank 0 shows all rows of them to whoever saves or loads; after a load the others get them from it. A
commit carries them in its meta, as numbers that JSON keeps exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptm.mesh.collectives import all_reduce_sum
from ptm.mesh.mesh import Mesh


class BufferRows:
    """StateRows of one buffer; the ranks but the first have none."""

    def __init__(self, buffer: Tensor, *, is_owner: bool) -> None:
        self._buffer = buffer
        self.shape, self.dtype = tuple(buffer.shape), buffer.dtype
        self.first_row, self.num_rows = 0, buffer.shape[0] if is_owner else 0

    def read(self) -> Tensor:
        return self._buffer[: self.num_rows].cpu()

    def write(self, rows: Tensor) -> None:
        self._buffer[: self.num_rows].copy_(rows)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def share(buffers: dict[str, Tensor], mesh: Mesh) -> None:
    """Give every rank what rank 0 has."""
    for buffer in buffers.values():
        if not mesh.is_main:
            buffer.zero_()
        all_reduce_sum(buffer, mesh.dp.get_group(), mesh.ledger)


def to_json(buffers: dict[str, Tensor]) -> dict[str, Any]:
    return {name: buffer.tolist() for name, buffer in buffers.items()}


def from_json(buffers: dict[str, Tensor], values: dict[str, Any]) -> None:
    for name, buffer in buffers.items():
        if name in values:
            buffer.copy_(torch.tensor(values[name], dtype=buffer.dtype))
