"""Localized filtering of Yuan 2.0 (arXiv 2311.15786): what a token knows of its two predecessors
before attention.

Two causal convolutions of width 2 over time, with full channel mixing, then a residual and a norm:

    c_t = A0 n_(t-1) + A1 n_t + a          conv1, D -> D/2
    y_t = B0 c_(t-1) + B1 c_t + b          conv2, D/2 -> D
    z_t = RMSNorm(y_t + n_t)

A width-2 convolution is one matrix product over rows [x_(t-1) ; x_t], so no layout change to
channels-first is made. Where a row has no predecessor (its sequence or document starts there, or
the predecessor is padding) both n_(t-1) and c_(t-1) are zero: c_(-1) is the second convolution's
own padding, not the first one's bias. The published code does this at the start of a sequence only,
so its packed documents and left padding leak; see `connected_BL`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.kernels.linear import linear
from ptm.kernels.rmsnorm import rms_norm


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
