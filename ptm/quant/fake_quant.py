"""Quantization-aware training: linears and experts whose forward sees weights on a grid.

    weight (what is trained)  --  scales by the grid's rule, codes, decoded  --  forward
           gradient  <--  as if the grid were not there (straight through)

A module is turned by its class alone: reading `weight` (or an expert's `w1`, `w2`) gives the value
on the grid, while the parameter, its name, its shards and its pages stay what they are. So every
dispatcher, engine and checkpoint works as before, and none of them knows.

Scales follow from the weights (`Grid.scales`, no candidates), so nothing is stored beside them, and
the export that takes the same weights has the same codes: no handover can lose anything. Groups run
along the inputs, which no engine cuts in the forward: weights are gathered whole.

Source: straight-through estimator, arXiv 1308.3432; its use here, arXiv 1712.05877.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptm.kernels import native
from ptm.kernels.fake_quant import fake_quant as by_kernel
from ptm.quant.grid import Grid, Quantized


def on_grid(w: Tensor, grid: Grid) -> Quantized:
    """Codes of a weight (..., K) by the rule of training and export; rows are flattened."""
    rows = w.detach().reshape(-1, w.shape[-1]).float()
    scale, zero = grid.scales(rows)
    return Quantized(grid, grid.encode(rows, scale, zero), scale, zero)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, grid: Grid) -> Tensor:
        return on_grid(w, grid).dequantize().view(w.shape).to(w.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


def fake_quant(w: Tensor, grid: Grid) -> Tensor:
    """The weight's nearest on the grid, in its type; the gradient goes straight through.

    Raises: ValueError where a weight is not finite, or too large for the type of its scale; where
    the kernel of a GPU serves such a group is NaN instead, as nothing waits for it.
    """
    if grid.scale_dtype is torch.float16 and native.serves("fake_quant", w):
        mantissa = 0 if grid.is_int else grid.mantissa_bits
        group, symmetric = grid.group, grid.is_symmetric
        return by_kernel(w, bits=grid.bits, mantissa=mantissa, group=group, symmetric=symmetric)
    return _FakeQuant.apply(w, grid)  # type: ignore[return-value]


def quantize_linear(linear: nn.Linear, grid: Grid) -> None:
    """Have `linear.weight` read as its value on the grid."""
    _turn(linear, grid, ("weight",))


def quantize_experts(experts: nn.Module, grid: Grid) -> None:
    """The same for stacked matrices `w1` and `w2`."""
    _turn(experts, grid, ("w1", "w2"))


def plain(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter behind what a turned module shows."""
    found = module._parameters[name]
    assert found is not None
    return found


def _turn(module: nn.Module, grid: Grid, names: tuple[str, ...]) -> None:
    kind = type(module)

    def shown(name: str) -> property:
        return property(lambda self: fake_quant(plain(self, name), grid))

    # Parameters live in _parameters; a property of the class is what reading the name finds first.
    module.__class__ = type(f"Fake{kind.__name__}", (kind,), {n: shown(n) for n in names})
