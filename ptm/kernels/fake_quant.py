"""Weights to their nearest on a grid and back, in one visit; the gradient goes straight through.

The grids and their reference are ptm/quant/grid.py's, without candidates and with scales in fp16:
`bits` 4 and 8 are integers, with zero points where not symmetric, 6 a sign, 5 - `mantissa` bits of
exponent and `mantissa` bits. The bits are the reference's.

On a GPU nothing waits for what the kernel finds: a group with a weight that is not finite, or too
large for its scale, becomes NaN, which the guard of a training step sees in the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptm.kernels import native

native.declare("fake_quant")

NOT_FINITE = "a weight is not finite, or too large for the type of its scale"

torch.library.define(
    "ptm::fake_quant", "(Tensor w, int bits, int mantissa, int group, bool symmetric) -> Tensor"
)


@torch.library.impl("ptm::fake_quant", native.DEVICES)
def _forward(w: Tensor, bits: int, mantissa: int, group: int, symmetric: bool) -> Tensor:
    w = w.contiguous()
    out = torch.empty_like(w)
    is_wild = torch.zeros(1, dtype=torch.int32) if w.device.type == "cpu" else None
    K = w.shape[-1]
    native.call("fake_quant", w, out, w.numel() // max(K, 1), K, group, bits, mantissa,
                int(symmetric), is_wild, int(w.dtype is torch.bfloat16))  # fmt: skip
    if is_wild is not None and is_wild.item():
        raise ValueError(NOT_FINITE)
    return out


@torch.library.register_fake("ptm::fake_quant")
def _like(w: Tensor, bits: int, mantissa: int, group: int, symmetric: bool) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _differentiate(ctx, grad: Tensor):
    return grad, None, None, None, None


torch.library.register_autograd("ptm::fake_quant", _differentiate)


def fake_quant(w: Tensor, *, bits: int, mantissa: int, group: int, symmetric: bool) -> Tensor:
    """(..., K) fp32 or bf16, dense -> the same shape and type.

    Raises: ValueError where a weight is not finite, or a scale overflows fp16; on a GPU the group
    is NaN then.
    """
    return torch.ops.ptm.fake_quant(w, bits, mantissa, group, symmetric)
