"""moe_mlp over the ranks of one machine, without sending rows: memory in which each rank has a
window, so that the windows of one kind are one matrix, row r x R + t of it row t of rank r.

    x      | rank 0: R rows of D     | rank 1 ... |   rows of tokens
    rows   | rank 0: R x A rows of D | rank 1 ... |   a token's A rows, to or from its experts
    ids    | rank 0: R x A numbers   | rank 1 ... |   which experts they are

The kernels of moe_mlp gather rows by their numbers, so they read those of all ranks, and write what
they make where the rank of the tokens looks for it (`forward_in_place`, `backward_in_place` of
moe_mlp.py). What that rank does with them is here, one visit each (csrc/moe_ep), with the bits of
torch in permute.py. Who may read or write when, ranks tell each other (ptm/parallel/in_memory.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptm.kernels import native

native.declare("moe_ep_combine")
LEAST = 64
"""Rows: a window of them is a multiple of a page."""


class Windows:
    """Views of one block of shared memory."""

    def __init__(self, memory: Tensor, num_ranks: int, rows: int, active: int, dim: int) -> None:
        sizes = _sizes(num_ranks, rows, active, dim)
        x, many, ids = memory.split(sizes)
        self.rows, self.active, self.dim = rows, active, dim
        self.x_MD = x.view(torch.bfloat16).view(num_ranks * rows, dim)
        self.rows_ND = many.view(torch.bfloat16).view(num_ranks * rows * active, dim)
        self.ids_WS = ids.view(torch.int64).view(num_ranks, rows * active)

    def holds(self, tokens: int, active: int, dim: int) -> bool:
        return tokens <= self.rows and (active, dim) == (self.active, self.dim)

    def x_of(self, rank: int, tokens: int) -> Tensor:
        """(T, D)"""
        return self.x_MD[rank * self.rows :][:tokens]

    def rows_of(self, rank: int, tokens: int) -> Tensor:
        """(T, A, D)"""
        return self.rows_ND.view(-1, self.active, self.dim)[rank * self.rows :][:tokens]

    def ids_of(self, rank: int, tokens: int) -> Tensor:
        """(T, A)"""
        return self.ids_WS[rank, : tokens * self.active].view(tokens, self.active)


def combined(rows_TAD: Tensor, weights_TA: Tensor, *, kept_TAD: Tensor | None) -> Tensor:
    """Each token's rows, weighted in bf16 and added up, (T, D); `kept` takes a copy of them."""
    T, A, D = rows_TAD.shape
    y_TD = rows_TAD.new_empty(T, D)
    native.call(
        "moe_ep_combine", rows_TAD, weights_TA.bfloat16().contiguous(), y_TD, kept_TAD, T, A, D
    )
    return y_TD


def spread(grad_TD: Tensor, weights_TA: Tensor, kept_TAD: Tensor, *, to_TAD: Tensor) -> Tensor:
    """The gradient of each of a token's rows to `to`; returns that of weights, as products to be
    added up over D, (T, A, D)."""
    by_TAD = torch.empty_like(kept_TAD)
    native.call("moe_ep_spread", grad_TD.contiguous(), weights_TA.bfloat16().contiguous(), kept_TAD,
                to_TAD, by_TAD, *kept_TAD.shape)  # fmt: skip
    return by_TAD


def added(rows_TAD: Tensor) -> Tensor:
    """Each token's rows added up, (T, D)."""
    T, A, D = rows_TAD.shape
    total_TD = rows_TAD.new_empty(T, D)
    native.call("moe_ep_add", rows_TAD, total_TD, T, A, D)
    return total_TD


def rows_for(tokens: int) -> int:
    """Rows of windows that are to hold so many tokens."""
    return max(1, -(-tokens // LEAST)) * LEAST


def window_bytes(num_ranks: int, rows: int, active: int, dim: int) -> int:
    """Of all of them."""
    return sum(_sizes(num_ranks, rows, active, dim))


def _sizes(num_ranks: int, rows: int, active: int, dim: int) -> list[int]:
    tokens = num_ranks * rows
    return [2 * tokens * dim, 2 * tokens * active * dim, 8 * tokens * active]
