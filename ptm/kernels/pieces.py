"""Pieces of a gradient from all ranks added up into a page in one visit (csrc/add_pieces).

Elsewhere, and where there is no kernel, torch does it in one visit a rank, another where the pieces
are bf16, and one more for the norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptm.kernels import native

native.declare("add_pieces")


def add_pieces(total_C: Tensor, pieces_NC: Tensor, *, replaces: bool) -> None:
    """Put the pieces, added rank by rank in fp32, into `total_C`, or add them. Modifies: total_C.

    Shapes: total_C (C,) fp32; pieces_NC (N, C) fp32 or bf16, N >= 1.
    """
    if _serves(total_C, pieces_NC):
        _call(total_C, pieces_NC, replaces, None, 0)
    else:
        _reference(total_C, pieces_NC, replaces)


def add_pieces_norms(total_C: Tensor, pieces_NC: Tensor, *, replaces: bool, chunk: int) -> Tensor:
    """As add_pieces; returns the 2-norms of `total_C` as it is then, one for each `chunk` elements,
    a multiple of 16,384: (C / chunk, rounded up) fp64. Modifies: total_C."""
    if _serves(total_C, pieces_NC):
        squares = total_C.new_empty(-(-len(total_C) // chunk), dtype=torch.float64)
        _call(total_C, pieces_NC, replaces, squares, chunk)
        return squares.sqrt_()
    _reference(total_C, pieces_NC, replaces)
    parts = total_C.split(chunk)
    norms = torch._foreach_norm(parts, 2, dtype=torch.float64)  # type: ignore[reportPrivateImportUsage]
    return torch.stack(norms)


def sum_pieces(pieces_NC: Tensor) -> Tensor:
    """(C,): the pieces added up in fp32, one after another; a single one as it is."""
    if len(pieces_NC) == 1:
        return pieces_NC[0]
    sum_C = pieces_NC[0].to(torch.float32, copy=True)
    for piece_C in pieces_NC[1:]:
        sum_C += piece_C
    return sum_C


def _serves(total_C: Tensor, pieces_NC: Tensor) -> bool:
    return (
        total_C.device == pieces_NC.device
        and pieces_NC.dtype in (torch.float32, torch.bfloat16)
        and pieces_NC.stride(1) == 1
        and native.has("add_pieces", total_C.device.type)
    )


def _call(
    total_C: Tensor, pieces_NC: Tensor, replaces: bool, squares: Tensor | None, chunk: int
) -> None:
    native.call(
        "add_pieces", pieces_NC[0], len(pieces_NC), pieces_NC.stride(0), total_C, len(total_C),
        int(replaces), squares, chunk, int(pieces_NC.dtype is torch.bfloat16),
    )  # fmt: skip


def _reference(total_C: Tensor, pieces_NC: Tensor, replaces: bool) -> None:
    if replaces:
        total_C.copy_(pieces_NC[0])
        for piece_C in pieces_NC[1:]:
            total_C += piece_C
    else:
        total_C += sum_pieces(pieces_NC)
