"""Cross entropy of a linear head, chunk by chunk, so that the logits of all tokens never exist at
once.

A chunk's logits are made, turned into probabilities, and, if a gradient is wanted, into that
gradient at once: the backward then only scales what the forward stored (d x and d weight), and no
product is done twice. Three products per chunk, as in plain training. (Liger-Kernel, arXiv
2410.10989, section 3.2.)

Logits have the type of x (bf16 in training) and are widened to fp32, in slices that stay in cache,
before the softmax. The negative log-likelihood comes from the largest entry: -log p_y = (max - log
p_max) - z_y, exact where p_y underflows.

Where bf16 is multiplied in fp32 (ptm/kernels/linear.py), a chunk's rows and a few words' weights at
a time are widened, and logits stay fp32.

That is the path of torch. On CPUs with AMX bf16 rows are served by csrc/linear_ce: logits of 1024
words at a time stay fp32 and turn into softmax or gradient in tiles that never leave the cache, and
the backward makes them anew, for it is one product more but no T x V tensor and no fp32 gradient of
the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.kernels import native
from ptm.kernels.linear import is_widened

native.declare("linear_ce")

IGNORED = -100
CHUNK_LOGITS = 2**23  # 16 MiB of bf16 logits
LEAST_CHUNK = 256  # tokens; fewer make a poor product
SLICE_LOGITS = 2**19  # 2 MiB of fp32 probabilities
WIDE_WEIGHTS = 2**21  # 8 MiB of weights in fp32


def linear_cross_entropy_reference(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """The definition, holding all logits; for tests."""
    logits = F.linear(x_TD, weight_VD).to(torch.promote_types(x_TD.dtype, torch.float32))
    return F.cross_entropy(logits, labels_T, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Sum of -log softmax(x W^T)[label] over tokens whose label is not -100.

    Shapes: x (T, D), weight (V, D), labels (T,) int64 -> () fp32. Holds `chunk_tokens(V)` rows of
    logits at most.
    """
    if is_compiled(x_TD, weight_VD):
        return torch.ops.ptm.linear_ce(x_TD, weight_VD, labels_T)[0]
    with_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, with_grad)  # type: ignore[return-value]


def is_compiled(x_TD: Tensor, weight_VD: Tensor) -> bool:
    """Whether csrc/linear_ce serves these rows."""
    return x_TD.dtype is torch.bfloat16 and native.serves("linear_ce", x_TD, weight_VD)


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are held at once; half of them where logits are widened."""
    return max(LEAST_CHUNK, CHUNK_LOGITS // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, with_grad: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if with_grad else None
        is_trained = with_grad and ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=wide) if is_trained else None
        V, D = weight.shape
        size, kind, num_words = chunk_tokens(V), x.dtype, V
        if is_widened(x):
            size, kind, num_words = size // 2, wide, max(1, WIDE_WEIGHTS // D)
        size = min(size, x.shape[0])
        chunk = x.new_empty(size, V, dtype=kind)
        words = [slice(start, start + num_words) for start in range(0, V, num_words)]
        for start in range(0, x.shape[0], max(size, 1)):
            rows = x[start : start + size].to(kind)
            logits = chunk[: rows.shape[0]]
            for part in words:
                torch.mm(rows, weight[part].to(kind).t(), out=logits[:, part])
            total += _nll_and_grad(logits, labels[start : start + size])
            if grad_x is None:
                continue
            by_rows = grad_x[start : start + size]
            by_wide = by_rows if kind is x.dtype else rows.new_empty(rows.shape)
            for i, part in enumerate(words):
                w = weight[part].to(kind)
                torch.addmm(by_wide, logits[:, part], w, beta=min(i, 1), out=by_wide)
                del w  # not kept beside the next chunk's
                if grad_weight is not None:
                    grad_weight[part] += logits[:, part].t() @ rows
            if by_wide is not by_rows:
                by_rows.copy_(by_wide)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad_x, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_x * grad, grad_weight, None, None


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


# The op: (sum of the losses, lse of each token's logits).
torch.library.define(
    "ptm::linear_ce", "(Tensor x, Tensor weight, Tensor labels) -> (Tensor, Tensor)"
)
torch.library.define(
    "ptm::linear_ce_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor labels, Tensor lse) -> (Tensor, Tensor)",
)


@torch.library.impl("ptm::linear_ce", "CPU")
def _loss(x: Tensor, weight: Tensor, labels: Tensor):
    nll, lse = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    native.call("linear_ce", x.contiguous(), weight.contiguous(), labels.contiguous(), lse, nll,
                *x.shape, weight.shape[0])  # fmt: skip
    return nll.sum(), lse


@torch.library.register_fake("ptm::linear_ce")
def _loss_result(x: Tensor, weight: Tensor, labels: Tensor):
    wide = torch.float32
    return x.new_empty((), dtype=wide), x.new_empty(x.shape[0], dtype=wide)


@torch.library.impl("ptm::linear_ce_backward", "CPU")
def _loss_backward(grad: Tensor, x: Tensor, weight: Tensor, labels: Tensor, lse: Tensor):
    x, weight = x.contiguous(), weight.contiguous()
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    native.call("linear_ce_backward", x, weight, labels.contiguous(), lse, grad_x, grad_weight,
                *x.shape, weight.shape[0], float(grad))  # fmt: skip
    return grad_x, grad_weight


@torch.library.register_fake("ptm::linear_ce_backward")
def _loss_gradients(grad: Tensor, x: Tensor, weight: Tensor, labels: Tensor, lse: Tensor):
    dense = torch.contiguous_format
    return torch.empty_like(x, memory_format=dense), torch.empty_like(weight, memory_format=dense)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad: Tensor, _):
    x, weight, labels, lse = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.ptm.linear_ce_backward(grad, x, weight, labels, lse)
    return grad_x, grad_weight, None


torch.library.register_autograd("ptm::linear_ce", _differentiate, setup_context=_save)
