"""Localized filtering of Yuan 2.0 (arXiv 2311.15786): what a token knows of its two predecessors
before attention.

Two causal convolutions of width 2 over time, with full channel mixing, then a residual and a norm:

    c_t = A0 n_(t-1) + A1 n_t + a          conv1, D -> D/2
    y_t = B0 c_(t-1) + B1 c_t + b          conv2, D/2 -> D
    z_t = RMSNorm(y_t + n_t)

A width-2 convolution is one matrix product over rows [x_(t-1) ; x_t], so no layout change to
channels-first is made. The kernel (csrc/lfa: bf16, D a multiple of 64) reads such a pair as it lies
in memory, a row and the one behind it, keeps c and the norm's input, and puts the weights'
gradients where an engine wants them (sink.py); elsewhere torch multiplies pairs that are made
before. Where a row has no predecessor (its sequence or document starts there, or
the predecessor is padding) both n_(t-1) and c_(t-1) are zero: c_(-1) is the second convolution's
own padding, not the first one's bias. The published code does this at the start of a sequence only,
so its packed documents and left padding leak; see `connected_BL`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.kernels import native
from ptm.kernels.linear import linear
from ptm.kernels.rmsnorm import rms_norm
from ptm.kernels.sink import put, rooms_of, sinks_of

native.declare("lfa")


def lfa(
    n_BLD: Tensor,
    *,
    conv1: tuple[Tensor, Tensor],
    conv2: tuple[Tensor, Tensor],
    norm: Tensor,
    eps: float,
    connected_BL: Tensor | None = None,
) -> Tensor:
    """Filter rows over time.

    Shapes: n (B, L, D); conv1 (weight (D/2, D, 2, 1), bias (D/2,)); conv2 ((D, D/2, 2, 1), (D,));
    norm (D,). connected (B, L) bool says whether position t continues position t-1; None: each row
    is one sequence. Its first column is ignored, as there is nothing before it.
    """
    weights = (*conv1, *conv2, norm)
    if _serves(n_BLD, *weights):
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (n_BLD, *weights))
        return torch.ops.ptm.lfa(n_BLD, *weights, connected_BL, eps, keep)[0]
    c_BLd = _convolve(n_BLD, conv1, connected_BL)
    return rms_norm(_convolve(c_BLd, conv2, connected_BL) + n_BLD, norm, eps)


def lfa_reference(
    n_LD: Tensor,
    *,
    conv1: tuple[Tensor, Tensor],
    conv2: tuple[Tensor, Tensor],
    norm: Tensor,
    eps: float,
) -> Tensor:
    """One document by two-dimensional convolutions, as published; for tests."""
    image = n_LD.t()[None, :, :, None]
    for weight, bias in (conv1, conv2):
        image = F.conv2d(F.pad(image, (0, 0, 1, 0)), weight, bias)
    return rms_norm(image[0, :, :, 0].t() + n_LD, norm, eps)


def fits(dtype: torch.dtype, D: int) -> bool:
    """Whether the kernel serves rows of this width on the CPU."""
    return dtype is torch.bfloat16 and D % 64 == 0 and native.has("lfa")


def _serves(n_BLD: Tensor, *weights: Tensor) -> bool:
    return fits(n_BLD.dtype, n_BLD.shape[-1]) and native.serves("lfa", n_BLD, *weights)


def _convolve(x_BLD: Tensor, conv: tuple[Tensor, Tensor], connected_BL: Tensor | None) -> Tensor:
    weight, bias = conv
    taps = torch.cat([weight[:, :, 0, 0], weight[:, :, 1, 0]], dim=1)
    return linear(_WithPrevious.apply(x_BLD, connected_BL), taps, bias)  # type: ignore[arg-type]


class _WithPrevious(torch.autograd.Function):
    """(B, L, D) -> (B, L, 2D): each row behind the one before it, or behind zeros where it
    continues none."""

    @staticmethod
    def forward(ctx, x: Tensor, connected: Tensor | None) -> Tensor:
        ctx.connected = connected
        B, L, D = x.shape
        pairs = x.new_empty(B, L, 2 * D)
        pairs[:, :1, :D] = 0
        pairs[:, 1:, :D] = x[:, : max(L - 1, 0)]
        pairs[..., D:] = x
        if connected is not None:
            pairs[..., :D].masked_fill_(~connected[..., None], 0)
        return pairs

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        D = grad.shape[-1] // 2
        before = grad[:, 1:, :D]
        if ctx.connected is not None:
            before = before.masked_fill(~ctx.connected[:, 1:, None], 0)
        grad_x = grad[..., D:].clone()
        grad_x[:, : before.shape[1]] += before
        return grad_x, None


# The op: (z, c, the norm's input, its scale a row); the middle two are empty unless kept.
torch.library.define(
    "ptm::lfa",
    "(Tensor n, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor norm, Tensor? connected,"
    " float eps, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ptm::lfa_backward",
    "(Tensor grad, Tensor n, Tensor w1, Tensor w2, Tensor norm, Tensor? connected, Tensor c,"
    " Tensor s, Tensor rstd, bool by_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("ptm::lfa", "CPU")
def _forward(n, w1, b1, w2, b2, norm, connected, eps: float, keep: bool):
    z, c, s, rstd = _forward_like(n, w1, b1, w2, b2, norm, connected, eps, keep)
    native.call("lfa", n.contiguous(), w1.contiguous(), b1.float(), w2.contiguous(), b2.float(),
                norm.float(), _bytes(connected, n), *((c, s) if keep else (None, None)), z, rstd,
                rstd.numel(), *n.shape[1:], float(eps))  # fmt: skip
    return z, c, s, rstd


@torch.library.register_fake("ptm::lfa")
def _forward_like(n, w1, b1, w2, b2, norm, connected, eps: float, keep: bool):
    B, L, D = n.shape
    kept = (B, L) if keep else (0, L)
    c, s = n.new_empty(*kept, D // 2), n.new_empty(*kept, D)
    return n.new_empty(B, L, D), c, s, n.new_empty(B, L, dtype=torch.float32)


@torch.library.impl("ptm::lfa_backward", "CPU")
def _backward(grad, n, w1, w2, norm, connected, c, s, rstd, by_weights: bool):
    saved = (n, w1, w2, norm, connected, c, s, rstd)
    by_n, by_w1, by_b1, by_w2, by_b2, by_norm = _gradients(grad, *saved, by_weights)
    into = (by_w1, by_w2) if by_weights else (None, None)
    narrow = _call_backward(grad, saved, by_n, *into)
    by_norm.copy_(narrow[2])
    if by_weights:
        by_b1.copy_(narrow[0])
        by_b2.copy_(narrow[1])
    return by_n, by_w1, by_b1, by_w2, by_b2, by_norm


def _call_backward(
    grad, saved, by_n, by_w1, by_w2, *, adds: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills by_n, by_w1 and by_w2 (or adds to these two); the gradients of the biases and of the
    norm in fp32."""
    n, w1, w2, norm, connected, *kept = saved
    D = n.shape[2]
    by_b1, by_b2, by_norm = (n.new_empty(k, dtype=torch.float32) for k in (D // 2, D, D))
    into = 0 if by_w1 is None else (by_w1.dtype is torch.float32) + adds
    native.call("lfa_backward", grad.contiguous(), n.contiguous(), w1.contiguous(),
                w2.contiguous(), norm.float(), _bytes(connected, n), *kept, by_n, by_w1, by_b1,
                by_w2, by_b2, by_norm, into, n.shape[:2].numel(), *n.shape[1:])  # fmt: skip
    return by_b1, by_b2, by_norm


@torch.library.register_fake("ptm::lfa_backward")
def _gradients(grad, n, w1, w2, norm, connected, c, s, rstd, by_weights: bool):
    D = n.shape[2]
    shapes = (w1.shape, (D // 2,), w2.shape, (D,))
    by = [n.new_empty(shape if by_weights else 0) for shape in shapes]
    return n.new_empty(n.shape), *by, torch.empty_like(norm)


def _bytes(connected: Tensor | None, n: Tensor) -> Tensor | None:
    return None if connected is None else connected.expand(n.shape[:2]).contiguous()


def _save(ctx, inputs, output) -> None:
    n, w1, _, w2, _, norm, connected, _, _ = inputs
    ctx.sinks = sinks_of(w1, w2)
    ctx.save_for_backward(n, w1, w2, norm, connected, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, *_: None):
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: a checkpoint gives them once
    n, w1, w2 = saved[0], saved[1], saved[2]
    by_weights = any(ctx.needs_input_grad[1:5])
    rooms = rooms_of(ctx.sinks) if by_weights else None
    if rooms is not None:
        by_n, (by_w1, by_w2) = n.new_empty(n.shape), rooms.into
        narrow = _call_backward(grad, saved, by_n, by_w1, by_w2, adds=rooms.adds)
        by_b1, by_b2, by_norm = (t.to(n.dtype) for t in narrow)
        return by_n, put(w1), by_b1, put(w2), by_b2, by_norm, None, None, None
    by_n, *by_conv, by_norm = torch.ops.ptm.lfa_backward(grad, *saved, by_weights)
    return by_n, *(by_conv if by_weights else (None,) * 4), by_norm, None, None, None


torch.library.register_autograd("ptm::lfa", _differentiate, setup_context=_save)
