"""The attention router of Yuan2.0-M32 (arXiv 2405.17976, section 2): experts that look at one
another.

Each token makes a query, a key and a value of one number per expert, and a tiny attention over the
experts, without a scale, gives one score per expert; the best A are taken and weighted by a softmax
over their scores:

    r_i = sum_j softmax_j(q_i k_j) v_j,   S = the A largest of r,   w = softmax(r_S)

The E x E attention of each token is 4 KiB in fp32, so it is never kept. Forward, one pass per key j
over all tokens and queries, with tokens innermost (wide vectors; E is small). Backward, only the
chosen scores carry a gradient, so only their A rows of the attention are computed again, and with p
= softmax_j(q_i k_j), g = d r_i:

    d v_j = sum_i g_i p_ij,   d s_ij = g_i p_ij (v_j - r_i),   d q_i = sum_j d s_ij k_j,   d k_j =
    sum_i d s_ij q_i

A balance loss is a function of all scores; then all rows are computed again, one pass per key.

All of it is fp32: near-ties are common (a fifth of tokens with random weights) and bf16 noise would
flip experts.

The kernels (csrc/router) do a token at a time in registers, and a backward that computes again only
rows with a gradient. They are two, scores and choice, so that recompute can keep the choice alone
(ptm/parallel/recompute.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptm.kernels import native

native.declare("attn_router", "router_top")
MAX_EXPERTS = 512  # of the kernel


class Chosen(NamedTuple):
    """The best experts of each token, best first: scores and ids (T, A) and the scores of all (T,
    E)."""

    weights_TA: Tensor
    ids_TA: Tensor
    scores_TE: Tensor


def top_experts(scores_TE: Tensor, num_active: int) -> Tensor:
    """Ids (T, A) of the largest scores, largest first; the lowest id wins a tie, on every
    device."""
    left = scores_TE
    ids = []
    for _ in range(
        num_active
    ):  # argmax promises the first of equals; topk and sort promise less or cost more
        ids.append(left.argmax(-1, keepdim=True))
        left = left.scatter(-1, ids[-1], -torch.inf)
    return torch.cat(ids, dim=-1)


def attention_router_reference(q_TE: Tensor, k_TE: Tensor, v_TE: Tensor, num_active: int) -> Chosen:
    """The definition, for tests."""
    attention = torch.softmax(q_TE.unsqueeze(2) * k_TE.unsqueeze(1), dim=-1)
    scores = (attention * v_TE.unsqueeze(1)).sum(-1)
    ids = top_experts(scores.detach(), num_active)
    return Chosen(scores.gather(1, ids).softmax(-1), ids, scores)


def attention_router(qkv_TX: Tensor, num_active: int, bias_E: Tensor | None = None) -> Chosen:
    """Choose experts. Shapes: qkv (T, 3E), the queries, keys and values side by side; the scores
    and weights are at least fp32. Gradients flow through weights and scores.

    bias_E is added to the scores for the choice alone; weights and scores are without it.
    """
    if native.serves("attn_router", qkv_TX) and qkv_TX.shape[1] <= 3 * MAX_EXPERTS:
        scores_TE = torch.ops.ptm.attn_router(qkv_TX)
        bias_E = None if bias_E is None else bias_E.float()
        weights_TA, ids_TA = torch.ops.ptm.router_top(scores_TE, num_active, bias_E)
        return Chosen(weights_TA, ids_TA, scores_TE)
    q_TE, k_TE, v_TE = qkv_TX.to(torch.promote_types(qkv_TX.dtype, torch.float32)).chunk(3, dim=-1)
    return Chosen(*_AttentionRouter.apply(q_TE, k_TE, v_TE, num_active, bias_E))  # type: ignore[misc]


class _AttentionRouter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, num_active: int, bias: Tensor | None):
        scores = _scores(q, k, v)
        ids = top_experts(scores if bias is None else scores + bias, num_active)
        weights = scores.gather(1, ids).softmax(-1)
        ctx.save_for_backward(q, k, v, scores, ids, weights)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return weights, ids, scores

    @staticmethod
    def backward(ctx, grad: Tensor | None, _: None, grad_scores: Tensor | None):  # type: ignore[override]
        q, k, v, scores, ids, weights = ctx.saved_tensors
        g_TA = torch.zeros_like(weights)
        if grad is not None:
            g_TA = weights * (grad - (grad * weights).sum(-1, keepdim=True))
        if grad_scores is not None:
            by_qkv = _scores_backward(grad_scores.scatter_add(1, ids, g_TA), q, k, v, scores)
            return *by_qkv, None, None
        g_TA1 = g_TA.unsqueeze(2)
        q_TA1, r_TA1 = q.gather(1, ids).unsqueeze(2), scores.gather(1, ids).unsqueeze(2)
        p_TAE = torch.softmax(q_TA1 * k.unsqueeze(1), dim=-1).mul_(g_TA1)
        grad_v = p_TAE.sum(1)
        s_TAE = p_TAE.mul_(v.unsqueeze(1) - r_TA1)
        grad_k = (s_TAE * q_TA1).sum(1)
        grad_q = torch.zeros_like(q).scatter_(1, ids, (s_TAE * k.unsqueeze(1)).sum(-1))
        return grad_q, grad_k, grad_v, None, None


def _scores(q_TE: Tensor, k_TE: Tensor, v_TE: Tensor) -> Tensor:
    q, k, v = (x.t().contiguous() for x in (q_TE, k_TE, v_TE))
    offset = _offset(q, k)
    total, mixed, part = torch.zeros_like(q), torch.zeros_like(q), torch.empty_like(q)
    for key, value in zip(k, v):
        torch.addcmul(offset, q, key, out=part).exp_()
        total += part
        mixed.addcmul_(part, value)
    return (mixed / total).t().contiguous()


def _offset(q_ET: Tensor, k_ET: Tensor) -> Tensor:
    # The largest q_i k_j over j is at the largest or the smallest key, by the sign of q_i.
    return torch.maximum(q_ET * k_ET.amax(0), q_ET * k_ET.amin(0)).neg_()


def _scores_backward(
    g_TE: Tensor, q_TE: Tensor, k_TE: Tensor, v_TE: Tensor, r_TE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v where each score has one."""
    g, q, k, v, r = (x.t().contiguous() for x in (g_TE, q_TE, k_TE, v_TE, r_TE))
    offset = _offset(q, k)
    total = torch.zeros_like(q)
    for key in k:
        total += torch.addcmul(offset, q, key).exp_()
    g = g / total
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    for j, (key, value) in enumerate(zip(k, v)):
        weighted = torch.addcmul(offset, q, key).exp_().mul_(g)
        grad_v[j] = weighted.sum(0)
        by_product = weighted.mul_(value - r)
        grad_k[j] = (by_product * q).sum(0)
        grad_q.addcmul_(by_product, key)
    return grad_q.t(), grad_k.t(), grad_v.t()


torch.library.define("ptm::attn_router", "(Tensor qkv) -> Tensor")
torch.library.define(
    "ptm::attn_router_backward", "(Tensor grad, Tensor qkv, Tensor scores) -> Tensor"
)
torch.library.define(
    "ptm::router_top", "(Tensor scores, int num_active, Tensor? bias) -> (Tensor, Tensor)"
)
torch.library.define(
    "ptm::router_top_backward",
    "(Tensor grad, Tensor weights, Tensor ids, int num_experts) -> Tensor",
)


@torch.library.impl("ptm::attn_router", native.DEVICES)
def _native_scores(qkv: Tensor) -> Tensor:
    scores = _empty_scores(qkv)
    is_bf16 = int(qkv.dtype is torch.bfloat16)
    native.call("attn_router", qkv.contiguous(), scores, *scores.shape, is_bf16)
    return scores


@torch.library.register_fake("ptm::attn_router")
def _empty_scores(qkv: Tensor) -> Tensor:
    return qkv.new_empty(len(qkv), qkv.shape[1] // 3, dtype=torch.float32)


@torch.library.impl("ptm::attn_router_backward", native.DEVICES)
def _native_scores_backward(grad: Tensor, qkv: Tensor, scores: Tensor) -> Tensor:
    out = _empty_gradient(grad, qkv, scores)
    native.call("attn_router_backward", grad.contiguous(), qkv.contiguous(), scores, out,
                *scores.shape, int(qkv.dtype is torch.bfloat16))  # fmt: skip
    return out


@torch.library.register_fake("ptm::attn_router_backward")
def _empty_gradient(grad: Tensor, qkv: Tensor, scores: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


@torch.library.impl("ptm::router_top", native.DEVICES)
def _native_top(scores: Tensor, num_active: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    weights, ids = _empty_top(scores, num_active, bias)
    bias = None if bias is None else bias.contiguous()
    native.call("router_top", scores.contiguous(), bias, weights, ids, *scores.shape, num_active)
    return weights, ids


@torch.library.register_fake("ptm::router_top")
def _empty_top(scores: Tensor, num_active: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = len(scores), num_active
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@torch.library.impl("ptm::router_top_backward", native.DEVICES)
def _native_top_backward(grad: Tensor, weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    out = _empty_top_gradient(grad, weights, ids, num_experts)
    native.call("router_top_backward", grad.contiguous(), weights, ids, out, *out.shape,
                ids.shape[1])  # fmt: skip
    return out


@torch.library.register_fake("ptm::router_top_backward")
def _empty_top_gradient(grad: Tensor, weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    return weights.new_empty(len(weights), num_experts)


def _save_scores(ctx, inputs, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _differentiate_scores(ctx, grad: Tensor) -> Tensor:
    return torch.ops.ptm.attn_router_backward(grad, *ctx.saved_tensors)


def _save_top(ctx, inputs, output) -> None:
    ctx.num_experts = inputs[0].shape[1]
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])


def _differentiate_top(ctx, grad: Tensor, _):
    return torch.ops.ptm.router_top_backward(grad, *ctx.saved_tensors, ctx.num_experts), None, None


torch.library.register_autograd(
    "ptm::attn_router", _differentiate_scores, setup_context=_save_scores
)
torch.library.register_autograd("ptm::router_top", _differentiate_top, setup_context=_save_top)
