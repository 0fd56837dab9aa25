"""Inference on packed codes: a linear, and the experts of a layer behind the dispatcher's door.

Codes stay packed in memory and are multiplied as they are (ptm/kernels/quant_linear.py). What the
kernels cannot take (groups that 32 does not divide, inputs whose groups are scattered) is
dequantized once, to bf16. Experts of one kind are one product over all that were chosen; where
groups differ, scales of the larger ones are repeated, and where bits do, each is a product.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptm.kernels.quant_linear import (
    STEP,
    PackedWeight,
    pack,
    regrouped,
    serves_linear,
    serves_moe,
    stack,
    unpack,
    wq_linear,
    wq_moe,
)
from ptm.quant.grid import Quantized

Weight = PackedWeight | Tensor


class Routing(Protocol):
    """What is read of ptm/model/router.py's."""

    @property
    def ids_TA(self) -> Tensor: ...
    @property
    def weights_TA(self) -> Tensor: ...


def packed(q: Quantized, order: Tensor | None = None) -> Weight:
    """A linear as it is multiplied: packed, or in bf16 where no kernel takes it."""
    if order is None and q.grid.group % STEP == 0:
        values = None if q.grid.is_int else q.grid.values()
        return pack(
            q.codes_NK, q.scale_NG, q.zero_NG, bits=q.grid.bits, group=q.grid.group, values=values
        )
    near = q.dequantize()
    if order is not None:
        near[:, order] = near.clone()
    return near.bfloat16()


def size_bytes(weight: Weight) -> int:
    if isinstance(weight, PackedWeight):
        return weight.size_bytes
    return weight.numel() * weight.element_size()


def product(x: Tensor, weight: Weight) -> Tensor:
    """x (..., K) times the transposed weight, (..., N) in x's type."""
    if not isinstance(weight, PackedWeight):
        return F.linear(x, weight.to(x.dtype))
    if x.device.type == "cpu" or serves_linear(x):
        return wq_linear(x, weight)
    return F.linear(x, unpack(weight).to(x.dtype))


class QuantLinear(nn.Module):
    """In the place of an nn.Linear without bias, for inference."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.packed = weight

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        super()._apply(fn, recurse)
        self.packed = _moved(self.packed, fn)
        return self


class QuantExperts(nn.Module):
    """In the place of a layer's experts, and its dispatcher too: all experts on this device."""

    def __init__(self, w1: Sequence[Weight], w2: Sequence[Weight]) -> None:
        super().__init__()
        self.w1, self.w2 = list(w1), list(w2)
        self.stacked = _stacked(self.w1, self.w2)
        if self.stacked is not None:
            self.w1, self.w2 = [], []

    def run(self, x_TD: Tensor, routing: Routing, experts: Any = None) -> Tensor:
        """As a Dispatcher's: each token's experts, weighted and added up, (T, D)."""
        if self.stacked is not None and self._is_one_product(x_TD, routing.ids_TA):
            return wq_moe(x_TD, routing.ids_TA, routing.weights_TA, *self.stacked)
        y_TD = torch.zeros_like(x_TD)
        for e in routing.ids_TA.unique().tolist():
            token, slot = torch.where(routing.ids_TA == e)
            w1, w2 = self.of(e)
            gate, up = product(x_TD[token], w1).chunk(2, dim=-1)
            out = product(F.silu(gate) * up, w2)
            y_TD.index_add_(0, token, out * routing.weights_TA[token, slot, None].to(out.dtype))
        return y_TD

    def _is_one_product(self, x_TD: Tensor, ids_TA: Tensor) -> bool:
        assert self.stacked is not None
        return x_TD.device.type == "cpu" or serves_moe(x_TD, ids_TA, len(self.stacked[0].codes))

    def of(self, e: int) -> tuple[Weight, Weight]:
        """The two matrices of expert e."""
        if self.stacked is None:
            return self.w1[e], self.w2[e]
        one, two = (dataclasses.replace(w, **_at(w, e)) for w in self.stacked)
        return one, two

    @property
    def size_bytes(self) -> int:
        return sum(map(size_bytes, self.stacked or (*self.w1, *self.w2)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantExperts:
        super()._apply(fn, recurse)
        if self.stacked is not None:
            one, two = (_moved(w, fn) for w in self.stacked)
            assert isinstance(one, PackedWeight) and isinstance(two, PackedWeight)
            self.stacked = one, two
        self.w1, self.w2 = ([_moved(w, fn) for w in side] for side in (self.w1, self.w2))
        return self


def _stacked(
    w1: Sequence[Weight], w2: Sequence[Weight]
) -> tuple[PackedWeight, PackedWeight] | None:
    found = []
    for side in (w1, w2):
        packed_ones = [w for w in side if isinstance(w, PackedWeight)]
        kinds = {(w.bits, w.zero is None, w.scale.dtype) for w in packed_ones}
        if len(packed_ones) < len(side) or len(kinds) != 1:
            return None
        group = math.gcd(*(w.group for w in packed_ones))
        found.append(stack([regrouped(w, group) for w in packed_ones]))
    one, two = found
    return (one, two) if one.bits == two.bits and one.scale.dtype == two.scale.dtype else None


def _at(weight: PackedWeight, e: int) -> dict[str, Any]:
    zero = None if weight.zero is None else weight.zero[e]
    return {"codes": weight.codes[e], "scale": weight.scale[e], "zero": zero}


def _moved(weight: Weight, fn: Callable[[Tensor], Tensor]) -> Weight:
    """To another device; codes and scales keep their types, as `fn` may be a cast of the model."""
    if not isinstance(weight, PackedWeight):
        return fn(weight)
    device = fn(torch.empty(0, device=weight.codes.device)).device
    if device == weight.codes.device:
        return weight
    keys = ("codes", "scale", "zero", "values")
    moved = {k: None if (t := getattr(weight, k)) is None else t.to(device) for k in keys}
    return dataclasses.replace(weight, **moved)
