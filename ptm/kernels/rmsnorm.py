"""RMSNorm (arXiv 1910.07467): scale each row to unit mean square, then by a weight per column; with
the residual add in front of it, which reads the same rows.

    s = x + residual,   y = s (mean(s^2) + eps)^-1/2 * weight

The mean square is taken in fp32 (fp64 for fp64 rows), the normalised row is cast back to its own
type and only then multiplied by the weight: the order of the published model. `_RMSNorm` is the
reference with its backward written out, which visits the row four times where autograd over the
definition makes eleven passes; the kernel (csrc/rmsnorm) reads and writes each row once, with the
add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptm.kernels import native

native.declare("add_rmsnorm")


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, for tests."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return unit.to(x.dtype) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim of `x`. Shapes: x (..., D), weight (D,) -> (..., D) in x's type."""
    if native.serves("add_rmsnorm", x, weight):
        return torch.ops.ptm.add_rmsnorm(x, None, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise: (the norm of x + residual, x + residual).

    Shapes: x, residual (..., D), weight (D,) -> both (..., D) in x's type.
    """
    if native.serves("add_rmsnorm", x, residual, weight):
        y, s, _ = torch.ops.ptm.add_rmsnorm(x, residual, weight, eps)
        return y, s
    s = x + residual
    return _RMSNorm.apply(s, weight, eps), s  # type: ignore[return-value]


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


# The op: (y, s, rstd). Without a residual s is empty, for x is at hand.
torch.library.define(
    "ptm::add_rmsnorm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ptm::add_rmsnorm_backward",
    "(Tensor grad, Tensor s, Tensor weight, Tensor rstd, Tensor? grad_s) -> (Tensor, Tensor)",
)


@torch.library.impl("ptm::add_rmsnorm", native.DEVICES)
def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float):
    x = x.contiguous()
    y, s, rstd = _results(x, residual, weight, eps)
    residual = None if residual is None else residual.contiguous()
    width = x.shape[-1]
    is_bf16 = int(x.dtype is torch.bfloat16)
    native.call("add_rmsnorm", x, residual, weight.float(), y, s, rstd,
                rstd.numel(), width, is_bf16, float(eps))  # fmt: skip
    return y, s, rstd


@torch.library.register_fake("ptm::add_rmsnorm")
def _results(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float):
    def like() -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    s = x.new_empty(0) if residual is None else like()
    return like(), s, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.impl("ptm::add_rmsnorm_backward", native.DEVICES)
def _backward(grad: Tensor, s: Tensor, weight: Tensor, rstd: Tensor, grad_s: Tensor | None):
    s = s.contiguous()
    out, grad_weight = torch.empty_like(s), weight.new_empty(weight.shape, dtype=torch.float32)
    is_bf16 = int(s.dtype is torch.bfloat16)
    grad_s = None if grad_s is None else grad_s.contiguous()
    native.call("add_rmsnorm_backward", grad.contiguous(), s, weight.float(), rstd, grad_s, out,
                grad_weight, rstd.numel(), s.shape[-1], is_bf16)  # fmt: skip
    return out, grad_weight.to(weight.dtype)


@torch.library.register_fake("ptm::add_rmsnorm_backward")
def _gradients(grad: Tensor, s: Tensor, weight: Tensor, rstd: Tensor, grad_s: Tensor | None):
    return torch.empty_like(s, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:
    x, residual, weight, _ = inputs
    _, s, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(s if ctx.has_residual else x, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y: Tensor | None, grad_s: Tensor | None, _: None):
    s, weight, rstd = ctx.saved_tensors
    if grad_y is None:
        return grad_s, grad_s, None, None
    grad_s = grad_s if ctx.has_residual else None
    grad, grad_weight = torch.ops.ptm.add_rmsnorm_backward(grad_y, s, weight, rstd, grad_s)
    return grad, grad if ctx.has_residual else None, grad_weight, None


torch.library.register_autograd("ptm::add_rmsnorm", _differentiate, setup_context=_save)
