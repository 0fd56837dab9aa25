"""Cross entropy of a linear head, chunk by chunk, so that the logits of all tokens never exist at
once.

A chunk's logits are made, turned into probabilities, and, if a gradient is wanted, into that
gradient at once: the backward then only scales what the forward stored (d x and d weight), and no
product is done twice. Three products per chunk, as in plain training. (Liger-Kernel, arXiv
2410.10989, section 3.2.)

Logits have the type of x (bf16 in training) and are widened to fp32, in slices that stay in cache,
before the softmax. The negative log-likelihood comes from the largest entry: -log p_y = (max - log
p_max) - z_y, exact where p_y underflows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
CHUNK_LOGITS = 2**23  # 16 MiB of bf16 logits
LEAST_CHUNK = 256  # tokens; fewer make a poor product
SLICE_LOGITS = 2**19  # 2 MiB of fp32 probabilities


def linear_cross_entropy_reference(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """The definition, holding all logits; for tests."""
    logits = F.linear(x_TD, weight_VD).to(torch.promote_types(x_TD.dtype, torch.float32))
    return F.cross_entropy(logits, labels_T, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Sum of -log softmax(x W^T)[label] over tokens whose label is not -100.

    Shapes: x (T, D), weight (V, D), labels (T,) int64 -> () fp32. Holds `chunk_tokens(V)` rows of
    logits at most.
    """
    with_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, with_grad)  # type: ignore[return-value]


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are held at once."""
    return max(LEAST_CHUNK, CHUNK_LOGITS // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, with_grad: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if with_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_grad else None
        size = min(chunk_tokens(weight.shape[0]), x.shape[0])
        chunk = x.new_empty(size, weight.shape[0])
        for start in range(0, x.shape[0], max(size, 1)):
            rows = x[start : start + size]
            logits = torch.mm(rows, weight.t(), out=chunk[: rows.shape[0]])
            total += _nll_and_grad(logits, labels[start : start + size])
            if grad_x is not None and grad_weight is not None:
                torch.mm(logits, weight, out=grad_x[start : start + size])
                grad_weight += logits.t() @ rows
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, (grad_weight * grad).to(ctx.weight_dtype), None, None


def _nll_and_grad(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p_label of a chunk; overwrites `logits` with its gradient, softmax - onehot."""
    T, V = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    kept_T1 = (labels != IGNORED).unsqueeze(1)
    label_T1 = labels.clamp(min=0).unsqueeze(1)
    size = min(max(1, SLICE_LOGITS // V), T)
    z_buffer, p_buffer = logits.new_empty(2, size, V, dtype=wide)  # reused: fresh pages are slow
    total = torch.zeros((), dtype=wide, device=logits.device)
    for start in range(0, T, max(size, 1)):
        rows = slice(start, min(start + size, T))
        z, p = (buffer[: rows.stop - start] for buffer in (z_buffer, p_buffer))
        torch.softmax(z.copy_(logits[rows]), -1, out=p)
        log_sum = z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        nll = log_sum - z.gather(1, label_T1[rows])
        total += nll.mul_(kept_T1[rows]).sum()
        p.scatter_add_(1, label_T1[rows], torch.full_like(nll, -1.0))
        logits[rows] = p.mul_(kept_T1[rows])
    return total
