"""RMSNorm (arXiv 1910.07467): scale each row to unit mean square, then by a weight per column.

The mean square is taken in fp32 (fp64 for fp64 rows), the normalised row is cast back to its own
type and only then multiplied by the weight: the order of the published model. `rms_norm` is the
reference with its backward written out, which visits the row four times where autograd over the
reference makes eleven passes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, for tests."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return unit.to(x.dtype) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim of `x`. Shapes: x (..., D), weight (D,) -> (..., D) in x's type."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (norm.square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        wide_weight = weight.to(scale.dtype)
        unit = x.to(scale.dtype) * scale
        wide = grad.to(scale.dtype)
        per_weight = (wide * unit).reshape(-1, width)
        grad_weight = per_weight.sum(0).to(weight.dtype)
        # d unit = g w; d x = scale (d unit - unit mean(d unit * unit)); d unit * unit = (g unit) w
        along = torch.mv(per_weight, wide_weight).div_(width).view_as(scale)
        grad_x = (wide * wide_weight).sub_(unit.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None
