"""Causal softmax attention: softmax(q k^T / sqrt(K)) v, under a mask that may keep documents apart.

Torch's own kernel serves everywhere, and one case is done here instead: training on a CPU, where
queries and keys have the same positions. The kernel (csrc/attention: bf16, heads whose width is a
multiple of 32) multiplies blocks of 32 queries and 32 keys, never the half above the diagonal, has
scores in fp32, and keeps one number a row for the backward (FlashAttention, arXiv 2205.14135).

Where it does not serve, per row and block of 128 queries all heads are multiplied at once against
the keys up to the block's end, and every product is one large oneDNN call. Up to KEPT_LENGTH
positions the backward finds the probabilities kept; beyond, it makes them again, so that memory
grows with L, not L^2. Scores are rounded to the input's type before the softmax there, which itself
runs in fp32: oneDNN has no product of bf16 matrices into fp32.

Measured 2026-11, one core of a Xeon (Sapphire Rapids), bf16, B=4 H=4 L=512 K=128, forward and
backward, beside the path of blocks and torch's kernel on the same instruction set: AMX 8 ms, 33 and
33; AVX-512 40, 66 and 56; AVX2 58, 79 and 609; SSE4.2 153, 187 and 782.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.kernels import native
from ptm.kernels.linear import is_widened, matmul

native.declare("attention")

BLOCK = 128
KEPT_LENGTH = 1024  # 1.1 KiB of bf16 per head and token there


def attention_reference(
    q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_BLS: Tensor | None = None
) -> Tensor:
    """The definition, holding all scores; for tests."""
    L, S = q_BHLK.shape[-2], k_BHSK.shape[-2]
    if mask_BLS is None:
        mask_BLS = torch.ones(1, L, S, dtype=torch.bool, device=q_BHLK.device).tril(S - L)
    scores = (q_BHLK @ k_BHSK.transpose(-1, -2)) / math.sqrt(q_BHLK.shape[-1])
    scores = scores.masked_fill(~mask_BLS[:, None], -math.inf)
    wide = torch.promote_types(q_BHLK.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(q_BHLK.dtype) @ v_BHSK


def causal_attention(
    q_BHLK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    mask_BLS: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from the last L of S positions.

    Shapes: q (B, H, L, K), k and v (B, H, S, K) -> (B, H, L, K). mask (B, L, S) bool: what each
    query may see, itself included; it must be causal. None: everything up to itself.
    """
    L, S = q_BHLK.shape[-2], k_BHSK.shape[-2]
    if _is_made_here(q_BHLK, k_BHSK, dropout):
        if is_compiled(q_BHLK, k_BHSK, v_BHSK, dropout=dropout):
            return torch.ops.ptm.attention(q_BHLK, k_BHSK, v_BHSK, mask_BLS)[0]
        return _BlockedAttention.apply(q_BHLK, k_BHSK, v_BHSK, mask_BLS)  # type: ignore[return-value]
    if mask_BLS is None and 1 < L < S:
        mask_BLS = torch.ones(1, L, S, dtype=torch.bool, device=q_BHLK.device).tril(S - L)
    return F.scaled_dot_product_attention(
        q_BHLK,
        k_BHSK,
        v_BHSK,
        attn_mask=None if mask_BLS is None else mask_BLS[:, None],
        dropout_p=dropout,
        is_causal=mask_BLS is None and L > 1,
    )


def is_compiled(q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, dropout: float) -> bool:
    """Whether csrc/attention serves these."""
    return (
        _is_made_here(q_BHLK, k_BHSK, dropout)
        and fits(q_BHLK.dtype, q_BHLK.shape[-1])
        and native.serves("attention", q_BHLK, v_BHSK)
    )


def _is_made_here(q_BHLK: Tensor, k_BHSK: Tensor, dropout: float) -> bool:
    is_all = q_BHLK.shape[-2] == k_BHSK.shape[-2] and q_BHLK.numel() > 0
    return q_BHLK.device.type == "cpu" and is_all and dropout == 0.0


def fits(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel serves heads of this width on the CPU."""
    return dtype is torch.bfloat16 and head_dim % 32 == 0 and native.has("attention")


torch.library.define(
    "ptm::attention", "(Tensor q, Tensor k, Tensor v, Tensor? mask) -> (Tensor, Tensor)"
)
torch.library.define(
    "ptm::attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("ptm::attention", "CPU")
def _forward(q, k, v, mask):
    out, lse = _forward_like(q, k, v, mask)
    native.call("attention", q.contiguous(), k.contiguous(), _by_token(v), _bytes(mask),
                _by_token(out), lse, 0 if mask is None else len(mask), *q.shape)  # fmt: skip
    return out, lse


@torch.library.register_fake("ptm::attention")
def _forward_like(q, k, v, mask):
    B, H, L, K = q.shape
    out = q.new_empty(B, L, H, K).transpose(1, 2)  # what the next product reads, in its order
    return out, q.new_empty(B, H, L, dtype=torch.float32)


@torch.library.impl("ptm::attention_backward", "CPU")
def _backward(grad, q, k, v, mask, out, lse):
    by_q, by_k, by_v = _gradients(grad, q, k, v, mask, out, lse)
    native.call("attention_backward", _by_token(grad), q.contiguous(), k.contiguous(), _by_token(v),
                _bytes(mask), _by_token(out), lse, by_q, by_k, _by_token(by_v),
                0 if mask is None else len(mask), *q.shape)  # fmt: skip
    return by_q, by_k, by_v


@torch.library.register_fake("ptm::attention_backward")
def _gradients(grad, q, k, v, mask, out, lse):
    B, H, L, K = q.shape
    return q.new_empty(B, H, L, K), q.new_empty(B, H, L, K), q.new_empty(B, L, H, K).transpose(1, 2)


def _by_token(x_BHLK: Tensor) -> Tensor:
    """(B, L, H, K), as projections make rows; no copy where it lies so."""
    return x_BHLK.transpose(1, 2).contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, _: None):
    if grad is None:
        return (None,) * 4
    return *torch.ops.ptm.attention_backward(grad, *ctx.saved_tensors), None


torch.library.register_autograd("ptm::attention", _differentiate, setup_context=_save)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, kept = torch.empty_like(q), []
        for row, start, end, bias in _blocks(q, mask):
            p = _probabilities(q[row, :, start:end], k[row, :, :end], bias)
            out[row, :, start:end] = matmul(p, v[row, :, :end])
            if q.shape[2] <= KEPT_LENGTH:
                kept.append(p)
        ctx.save_for_backward(q, k, v, mask, *kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v, mask, *kept = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, (row, start, end, bias) in enumerate(_blocks(q, mask)):
            queries, keys, values = q[row, :, start:end], k[row, :, :end], v[row, :, :end]
            above = grad[row, :, start:end]
            p = kept[i] if kept else _probabilities(queries, keys, bias)
            grad_v[row, :, :end] += matmul(p.transpose(1, 2), above)
            by_p = matmul(above, values.transpose(1, 2))
            by_score = torch.ops.aten._softmax_backward_data(by_p, p, -1, p.dtype)
            grad_q[row, :, start:end] = matmul(by_score, keys)
            grad_k[row, :, :end] += matmul(by_score.transpose(1, 2), queries)
        scale = 1.0 / math.sqrt(q.shape[-1])
        return grad_q.mul_(scale), grad_k.mul_(scale), grad_v, None


def _blocks(q: Tensor, mask: Tensor | None):
    """Yield (row, first query, end, bias (queries, keys)): 0 where a query may see a key, else
    -inf."""
    B, _, L, _ = q.shape
    # One picture serves all unmasked blocks: zeros, then a triangle, cut where the triangle fits.
    size = min(BLOCK, L)
    triangle = torch.full((size, size), -math.inf, dtype=q.dtype).triu_(1)
    causal = torch.cat([q.new_zeros(size, L), triangle], dim=1)
    for row in range(B):
        for start in range(0, L, size):
            end = min(start + size, L)
            if mask is None:
                bias = causal[: end - start, L - start : L - start + end]
            else:
                hidden = ~mask[row if mask.shape[0] > 1 else 0, start:end, :end]
                bias = q.new_zeros(end - start, end).masked_fill_(hidden, -math.inf)
            yield row, start, end, bias


def _probabilities(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    scale = 1.0 / math.sqrt(queries.shape[-1])
    bias = bias.expand(queries.shape[0], -1, -1)
    if is_widened(queries):
        bias, wide = bias.float(), queries.float()
        scores = torch.baddbmm(bias, wide, keys.float().transpose(1, 2), alpha=scale)
        return scores.softmax(-1).to(queries.dtype)
    return torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale).softmax(-1)
