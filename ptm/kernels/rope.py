"""Rotary position embedding (arXiv 2104.09864) on the leading dims of each head, in half-split
pairs (i, i + R/2).

    angle(p, i) = p * base^(-2i/R),  i < R/2 x_i' = x_i cos - x_(i+R/2) sin,  x_(i+R/2)' = x_(i+R/2)
    cos + x_i sin;  dims R and up pass through

Three precisions of the angle are in use for the same model, and they differ by radians at position
1000:

    fp32       everything in fp32. For new training.
    megatron   frequencies rounded to bf16, the rest in fp32: how published weights were trained.
    hf_bf16    frequencies, positions, their product, cosine and sine rounded to bf16, and the base
               10000 whatever the recipe says: the published Hugging Face code, where 16384
               positions collapse to 1025.

The turn itself is done in fp32 and cast back. `rope` also moves heads in front of positions, which
attention wants, so that the layout change costs no pass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

HF_BASE = 10_000.0


def rope_angles(
    position_ids_BL: Tensor, *, rotary_dim: int, base: float, mode: str
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of integer positions, each (B, L, R/2) fp32; `mode` is fp32, megatron or
    hf_bf16."""
    exponents = torch.arange(0, rotary_dim, 2, device=position_ids_BL.device, dtype=torch.float32)
    if mode == "hf_bf16":
        frequencies = (1.0 / HF_BASE ** (exponents / rotary_dim)).bfloat16()
        angles = position_ids_BL.bfloat16().unsqueeze(-1) * frequencies
        return angles.cos().float(), angles.sin().float()
    frequencies = 1.0 / base ** (exponents / rotary_dim)
    if mode == "megatron":
        frequencies = frequencies.bfloat16().float()
    angles = position_ids_BL.float().unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def rope_reference(x_BLHCK: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> Tensor:
    """The definition, for tests: the same result as `rope`."""
    half = cos_BLR.shape[-1]
    cos, sin = cos_BLR[:, :, None, None], sin_BLR[:, :, None, None]
    first, second, rest = x_BLHCK.split([half, half, x_BLHCK.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return turned.to(x_BLHCK.dtype).permute(3, 0, 2, 1, 4)


def rope(x_BLHCK: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> Tensor:
    """Turn the heads of several tensors (queries and keys, C = 2) at once.

    Shapes: x (B, L, H, C, K), cosines and sines (B, L, R/2) -> (C, B, H, L, K), contiguous, in x's
    type.
    """
    return _Rope.apply(x_BLHCK, cos_BLR, sin_BLR)  # type: ignore[return-value]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        turned = x.permute(3, 0, 2, 1, 4).clone(memory_format=torch.contiguous_format)
        return _turn_(turned, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        turned = grad.clone(memory_format=torch.contiguous_format)
        back = _turn_(turned, cos, -sin)  # the inverse of a rotation
        return back.permute(1, 3, 2, 0, 4), None, None


def _turn_(x_CBHLK: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> Tensor:
    half = cos_BLR.shape[-1]
    wide = torch.promote_types(x_CBHLK.dtype, torch.float32)
    cos, sin = (t[None, :, None].to(wide) for t in (cos_BLR, sin_BLR))
    both = x_CBHLK[..., : 2 * half].to(wide, copy=True)
    first, second = both[..., :half], both[..., half:]
    x_CBHLK[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    x_CBHLK[..., half : 2 * half] = (second * cos).addcmul_(first, sin)
    return x_CBHLK
