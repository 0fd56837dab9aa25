"""Causal attention behind a prefix: keys and values that every query sees, whatever its document
(ptm/model/adapter.py).

    softmax([q p^T ; q k^T] / sqrt(K)) [p' ; v]

Where the kernel of causal attention serves (training on a CPU in bf16), the two softmaxes are
joined by their sums: out = (e^lse out' + sum e^s p') / e^total. The backward of FlashAttention asks
only for the sum and the output of the whole softmax, so given those it is right for its part of the
keys. Elsewhere the prefix stands before the keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.kernels.attention import causal_attention, is_compiled


def prefix_attention(
    q_BHLK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    keys_PV: Tensor,
    values_PV: Tensor,
    mask_BLS: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """`causal_attention` in which every query sees P positions more, (P, H x K) each."""
    B, H, _, K = q_BHLK.shape
    keys_HPK, values_HPK = (x.view(-1, H, K).transpose(0, 1) for x in (keys_PV, values_PV))
    if is_compiled(q_BHLK, k_BHSK, v_BHSK, dropout=dropout):
        joined = _Joined.apply(q_BHLK, k_BHSK, v_BHSK, keys_HPK, values_HPK, mask_BLS)
        return joined  # type: ignore[return-value]
    k, v = (
        torch.cat([near.expand(B, -1, -1, -1), rest], dim=2)
        for near, rest in ((keys_HPK, k_BHSK), (values_HPK, v_BHSK))
    )
    mask = None if mask_BLS is None else F.pad(mask_BLS, (len(keys_PV), 0), value=True)
    return causal_attention(q_BHLK, k, v, mask, dropout=dropout)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, keys, values, mask):  # type: ignore[override]
        out, lse = torch.ops.ptm.attention(q, k, v, mask)
        scores = q.float() @ keys.float().transpose(1, 2) / math.sqrt(q.shape[-1])
        own = lse * math.log(2.0)  # the kernel's is of powers of 2
        total = torch.logaddexp(own, scores.logsumexp(-1))
        near = (scores - total[..., None]).exp_() @ values.float()
        out = torch.addcmul(near, out, (own - total).exp_()[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, keys, values, mask, out, total)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, keys, values, mask, out, total = ctx.saved_tensors
        lse = total / math.log(2.0)
        by_q, by_k, by_v = torch.ops.ptm.attention_backward(grad, q, k, v, mask, out, lse)
        scale, wide, keys, values = q.shape[-1] ** -0.5, grad.float(), keys.float(), values.float()
        p = (q.float() @ keys.transpose(1, 2) * scale - total[..., None]).exp_()
        by_values = (p.transpose(2, 3) @ wide).sum(0)
        delta = (wide * out).sum(-1, keepdim=True)
        by_scores = p * (wide @ values.transpose(1, 2) - delta) * scale
        by_keys = (by_scores.transpose(2, 3) @ q.float()).sum(0)
        by_q = (by_q.float() + by_scores @ keys).to(q.dtype)
        return by_q, by_k, by_v, by_keys.to(q.dtype), by_values.to(q.dtype), None
