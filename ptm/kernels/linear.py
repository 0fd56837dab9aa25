"""Dense products on the CPU: x W^T, and how bf16 is multiplied where the CPU has no such products.

CPUs without products of bf16 (AVX2 and below: most laptops; AVX-512 before Cooper Lake and Zen 4)
take 3 to 60 times as long for torch's products of bf16 as for those of fp32. There operands are
widened and multiplied in fp32, and the result is rounded once, which is what a product of bf16 does
in hardware. Few rows are left to torch: they cost less than widening the weight.

Measured 2026-11, one core of an AMD EPYC (Zen 3): 2,048 tokens of mini, forward and backward, 2.3 s
in place of 18; of a Xeon of Cascade Lake (AVX-512 without bf16), 2.2 in place of 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8
# Asked once: torch.compile does not look inside.
_WIDENS = torch.backends.mkldnn.is_available() and not (
    # said of any AVX-512 too, where oneDNN takes bf16 apart at each use
    torch.ops.mkldnn._is_mkldnn_bf16_supported()
    and (not torch.cpu._is_avx512_supported() or torch.cpu._is_avx512_bf16_supported())
)


def is_widened(x: Tensor) -> bool:
    """Whether bf16 products of x are made in fp32."""
    return _WIDENS and x.dtype is torch.bfloat16 and x.device.type == "cpu"


def widen(x: Tensor) -> Tensor:
    """x in the type in which products of it are made."""
    return x.float() if is_widened(x) else x


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type in which products of `dtype` are made."""
    return torch.float32 if is_widened(torch.empty(0, dtype=dtype, device=device)) else dtype


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of their type. No gradient: for use inside of autograd functions."""
    return (widen(a) @ widen(b)).to(a.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: (..., in), (out, in) -> (..., out)."""
    if not is_widened(x) or x.numel() < FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    y: Tensor = _WideLinear.apply(x, weight)  # type: ignore[assignment]
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        by_x, by_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if by_weight else None, weight if by_x else None)
        return matmul(x, weight.t())

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        by_x = None if weight is None else matmul(grad, weight)
        by_weight = None
        if x is not None:
            by_weight = matmul(grad.flatten(0, -2).t(), x.flatten(0, -2))
        return by_x, by_weight
