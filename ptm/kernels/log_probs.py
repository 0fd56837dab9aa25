"""Log-probabilities of labels under a linear head, one per token, chunk by chunk.

What losses over log-probabilities (preferences, policy gradients) need where `linear_cross_entropy`
gives only a sum. Each token has a gradient of its own, unknown in the forward, so the backward
makes a chunk's logits again: one product more, and never all logits at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.kernels.linear import matmul
from ptm.kernels.loss import chunk_tokens


def linear_log_probs_reference(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, temperature: float = 1.0
) -> Tensor:
    """The definition, holding all logits; for tests."""
    logits = F.linear(x_TD, weight_VD).to(torch.promote_types(x_TD.dtype, torch.float32))
    return (logits / temperature).log_softmax(-1).gather(1, labels_T[:, None]).squeeze(1)


def linear_log_probs(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, temperature: float = 1.0
) -> Tensor:
    """log softmax(x W^T / temperature)[label].

    Shapes: x (T, D), weight (V, D), labels (T,) int64 -> (T,) fp32.
    """
    return _LinearLogProbs.apply(x_TD, weight_VD, labels_T, temperature)  # type: ignore[return-value]


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(x, weight, labels)
        ctx.temperature = temperature
        out = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        for rows in _chunks(len(x), len(weight)):
            z = _logits(x[rows], weight, temperature)
            out[rows] = z.gather(1, labels[rows, None]).squeeze(1) - z.logsumexp(-1)
            del z  # before the next chunk's
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, labels = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        is_trained = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if is_trained else None
        for rows in _chunks(len(x), len(weight)):
            g = _by_logits(
                x[rows], weight, labels[rows], grad[rows] / ctx.temperature, ctx.temperature
            )
            grad_x[rows] = matmul(g, weight)
            if grad_weight is not None:
                grad_weight += matmul(g.t(), x[rows])
            del g
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, None, None


def _by_logits(
    x: Tensor, weight: Tensor, labels: Tensor, grad: Tensor, temperature: float
) -> Tensor:
    """grad times d log p_label / d logits = onehot(label) - p, in x's type."""
    p = _logits(x, weight, temperature).softmax(-1).mul_(-grad[:, None])
    return p.scatter_add_(1, labels[:, None], grad[:, None]).to(x.dtype)


def _logits(x: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = matmul(x, weight.t())
    return logits.to(torch.promote_types(x.dtype, torch.float32)).div_(temperature)


def _chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    size = chunk_tokens(vocab_size)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]
