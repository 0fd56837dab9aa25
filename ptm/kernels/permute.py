"""Moving token rows into groups, one group per expert, and back.

Grouped rows lie expert after expert, in token order within one, and each group starts at a multiple
of ALIGN:

    | expert 0: 11 | 5 zero | expert 1: 16 | (expert 2: none) | expert 3: 2 | 14 zero | slack

Zero rows stay zero through an expert without biases, and cost a few per cent. They buy few distinct
shapes (oneDNN compiles one kernel per shape: with exact sizes the first steps run at half speed)
and, on CUDA, alignment. The total is bounded by shape alone, so nothing waits for the counts; the
slack behind the last group is zero too.

A token's place for each of its experts is its *slot*; moving there and back is indexing by slots,
with no sorting of rows and no atomic adds, so results do not depend on threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGN = 16


def aligned(counts_E: Tensor) -> Tensor:
    """Rows each group takes, zero rows included."""
    return (counts_E + (ALIGN - 1)) // ALIGN * ALIGN


def grouped_rows(num_rows: int, num_groups: int) -> int:
    """Rows that `num_rows` can take at most in groups, whatever the counts."""
    return num_rows + min(num_rows, num_groups) * (ALIGN - 1)


def slots(ids_TA: Tensor, counts_E: Tensor) -> Tensor:
    """Row (T, A) of each token for each of its experts in the grouped layout."""
    ids = ids_TA.flatten()
    order = torch.argsort(ids, stable=True)
    space = aligned(counts_E)
    shift_E = (space.cumsum(0) - space) - (counts_E.cumsum(0) - counts_E)
    place = torch.empty_like(ids)
    place[order] = torch.arange(ids.numel(), device=ids.device) + shift_E[ids[order]]
    return place.view_as(ids_TA)


def permute(x_TD: Tensor, slots_TA: Tensor, num_rows: int) -> Tensor:
    """Copy each token to its slots. Shapes: x (T, D) -> (num_rows, D), zero where no slot
    points."""
    return _Permute.apply(x_TD, slots_TA, num_rows)  # type: ignore[return-value]


def combine(y_RD: Tensor, slots_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """Add up each token's rows, weighted. Shapes: y (R, D), weights (T, A) -> (T, D).

    Weights are cast to y's type before the product, as the published model does.
    """
    return _Combine.apply(y_RD, slots_TA, weights_TA)  # type: ignore[return-value]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(slots)
        rows = x.new_zeros(num_rows, x.shape[1])
        for slot in slots.unbind(1):
            rows.index_copy_(0, slot, x)
        return rows

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (slots,) = ctx.saved_tensors
        first, *others = slots.unbind(1)
        total = grad.index_select(0, first)
        for slot in others:
            total += grad.index_select(0, slot)
        return total, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y, slots, weights)
        total = y.new_zeros(slots.shape[0], y.shape[1])
        for slot, weight in zip(slots.unbind(1), weights.to(y.dtype).unbind(1)):
            total.addcmul_(y.index_select(0, slot), weight.unsqueeze(1))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        y, slots, weights = ctx.saved_tensors
        grad_y = torch.zeros_like(y)
        grad_weights = torch.empty_like(weights)
        for a, (slot, weight) in enumerate(zip(slots.unbind(1), weights.to(y.dtype).unbind(1))):
            grad_y.index_copy_(0, slot, grad * weight.unsqueeze(1))
            grad_weights[:, a] = (grad * y.index_select(0, slot)).sum(-1, dtype=weights.dtype)
        return grad_y, None, grad_weights
