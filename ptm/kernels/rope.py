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

The turn itself is done in fp32 and cast back, and heads move in front of positions, which attention
wants, so that the layout change costs no pass of its own. `rope_qk` takes the rows of the two
projections as Yuan's checkpoints lay them out: [q | k] of a token is H heads x (q, k) x K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptm.kernels import native

native.declare("rope_qk")

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


def rope_qk(
    q_BLV: Tensor, k_BLV: Tensor, cos_BLR: Tensor, sin_BLR: Tensor, *, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Turn the rows of both projections into heads with positions.

    Shapes: rows (B, L, H x K), cosines and sines (B or 1, L, R/2) -> two of (B, H, L, K).
    """
    is_served = cos_BLR.dtype is torch.float32 and not cos_BLR.requires_grad
    if is_served and native.serves("rope_qk", q_BLV, k_BLV):
        return torch.ops.ptm.rope_qk(q_BLV, k_BLV, cos_BLR, sin_BLR, num_heads)
    B, L, width = q_BLV.shape
    x_BLHCK = torch.cat([q_BLV, k_BLV], dim=-1).view(B, L, num_heads, 2, width // num_heads)
    q_BHLK, k_BHLK = rope(x_BLHCK, cos_BLR, sin_BLR).unbind(0)
    return q_BHLK, k_BHLK


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


torch.library.define(
    "ptm::rope_qk",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, int num_heads) -> (Tensor, Tensor)",
)
torch.library.define(
    "ptm::rope_qk_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
)


@torch.library.impl("ptm::rope_qk", native.DEVICES)
def _forward(q_BLV: Tensor, k_BLV: Tensor, cos: Tensor, sin: Tensor, num_heads: int):
    rows = q_BLV.contiguous(), k_BLV.contiguous()
    heads = _heads(q_BLV, k_BLV, cos, sin, num_heads)
    _turn_rows(rows, heads, cos, sin, is_backward=False, heads_inside=False)
    return heads


@torch.library.register_fake("ptm::rope_qk")
def _heads(q_BLV: Tensor, k_BLV: Tensor, cos: Tensor, sin: Tensor, num_heads: int):
    B, L, width = q_BLV.shape
    shape = B, num_heads, L, width // num_heads
    return q_BLV.new_empty(shape), k_BLV.new_empty(shape)


@torch.library.impl("ptm::rope_qk_backward", native.DEVICES)
def _backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor):
    heads_inside = all(g.transpose(1, 2).is_contiguous() for g in (grad_q, grad_k))
    # Attention makes these gradients as (B, L, H, K) in memory: they are read as they are.
    heads = tuple(g.transpose(1, 2) if heads_inside else g.contiguous() for g in (grad_q, grad_k))
    rows = _rows(grad_q, grad_k, cos, sin)
    _turn_rows(rows, heads, cos, sin, is_backward=True, heads_inside=heads_inside)
    return rows


@torch.library.register_fake("ptm::rope_qk_backward")
def _rows(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor):
    B, H, L, K = grad_q.shape
    return grad_q.new_empty(B, L, H * K), grad_k.new_empty(B, L, H * K)


def _turn_rows(rows, heads, cos: Tensor, sin: Tensor, *, is_backward: bool, heads_inside: bool):
    B, L, width = rows[0].shape
    K = heads[0].shape[-1]
    assert cos.shape == sin.shape and len(cos) in (1, B), (cos.shape, rows[0].shape)
    native.call("rope_qk", *rows, *heads, cos.contiguous(), sin.contiguous(), B, L, width // K, K,
                cos.shape[-1], len(cos), int(is_backward), int(heads_inside),
                int(rows[0].dtype is torch.bfloat16))  # fmt: skip


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])


def _differentiate(ctx, grad_q: Tensor, grad_k: Tensor):
    return *torch.ops.ptm.rope_qk_backward(grad_q, grad_k, *ctx.saved_tensors), None, None, None


torch.library.register_autograd("ptm::rope_qk", _differentiate, setup_context=_save)
