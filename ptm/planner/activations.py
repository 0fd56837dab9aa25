"""What forward and backward of one micro-batch hold beside the states, in closed form.

A step has four moments at which a rank can hold most, and the plan takes the largest; in between,
and at the embedding in the end, less is held:

    loss       all saved activations, one chunk of logits, the gradient of the head
    head       the same without logits, while the backward scales that gradient
    experts    the backward of the last layer's experts: their rows and their weights' gradients
    attention  that of its attention, which at long sequences makes large blocks of scores

With recompute=block, layers save their input only and one layer at a time is saved whole.
Beside frozen weights, layers save their changed weights, and the head has no gradient. (With no
change below its experts the first layer saves less than is counted.)

Symbols: T tokens of a micro-batch, D hidden, P attention width, E experts, e experts of this rank,
A active, F expert hidden, R rows of experts, V vocabulary, c bytes of the compute format.
tests/planner/test_memory.py holds them against what torch's allocator counts. Not covered: groups
of experts far from even (see `_experts_backward`), ranks of an ep axis that get more rows than
others, fragmentation on a GPU, and whether the formulas hold for CUDA, which is not measured yet.
"""

from __future__ import annotations

import torch

from ptm.kernels import attention as attention_kernel
from ptm.kernels import lfa as lfa_kernel
from ptm.kernels import loss as loss_kernel
from ptm.kernels import moe_mlp as moe_kernel
from ptm.kernels.linear import product_dtype
from ptm.kernels.permute import grouped_rows
from ptm.model.config import RouterKind
from ptm.model.lora_config import AdapterKind
from ptm.planner.job import Job

FP32, INT64 = 4, 8


def activations(job: Job) -> int:
    """The most that forward and backward of one micro-batch hold beside the states."""
    return max(moments(job).values())


def moments(job: Job) -> dict[str, int]:
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    D, V, layers = m.hidden_size, m.vocab_size, m.num_hidden_layers
    head_numel = 0 if _is_frozen(job) else V * D
    row_bytes, head, head_fp32 = T * D * c, head_numel * c, head_numel * FP32
    layer = saved_by_layer(job)
    # Recomputed blocks keep their input and which experts each token was sent to.
    input_bytes = T * D * c + T * m.num_experts_per_tok * INT64
    below = input_bytes if job.recompute == "block" else layer
    saved = layers * below + _shared(job) + 2 * row_bytes + T * FP32  # final norm: input, output
    # The tied head's gradient waits for the embedding's until the end of the backward.
    waiting = head if m.tie_word_embeddings else 0
    cast = head if c != FP32 else 0
    return {
        "loss": saved + row_bytes + head_fp32 + _loss(job),
        "head": saved + 2 * row_bytes + 2 * head_fp32 + cast,
        "experts": (layers - 1) * below + _shared(job) + waiting + _experts_backward(job),
        "attention": (layers - 1) * below + _shared(job) + waiting + _attention_backward(job),
    }


def _loss(job: Job) -> int:
    """Logits of one chunk of tokens, and beside them fp32 slices or their gradient for the head.

    Of torch's path. csrc/linear_ce holds less, and scratch memory out of torch's sight.
    """
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    V = m.vocab_size
    most = loss_kernel.chunk_tokens(V)
    if job.has_log_probs:
        return _log_probs(job, min(T, most))
    chunk = min(T, most // 2 if _is_widened(job) else most)
    slices = 2 * min(max(1, loss_kernel.SLICE_LOGITS // V), chunk) * V * FP32
    head = 0 if _is_frozen(job) else V * m.hidden_size
    if _is_widened(job):  # rows, their gradient, weights of some words, and their gradient
        words = min(V * m.hidden_size, loss_kernel.WIDE_WEIGHTS)
        products = (2 * chunk * m.hidden_size + words + min(head, words)) * FP32
        return chunk * V * FP32 + max(slices, products)
    return chunk * V * c + max(slices, head * c + _widened(job, head))


def _log_probs(job: Job, chunk: int) -> int:
    """Of ptm/kernels/log_probs.py: a chunk's logits and probabilities in fp32, then the gradient of
    its logits and what they add to the head's."""
    m, c = job.model, job.compute_bytes
    numel, head = chunk * m.vocab_size, 0 if _is_frozen(job) else m.vocab_size * m.hidden_size
    return max(2 * numel * FP32, numel * c + head * c + _widened(job, head))


def _is_widened(job: Job) -> bool:
    """Whether bf16 is multiplied in fp32 (ptm/kernels/linear.py)."""
    is_bf16 = job.device == "cpu" and job.compute_bytes != FP32
    return is_bf16 and product_dtype(torch.device("cpu"), torch.bfloat16) is torch.float32


def _widened(job: Job, count: int) -> int:
    """Torch's copy of a bf16 tensor in fp32, made whole on the CPU to add it to an fp32 one."""
    return count * FP32 if job.compute_bytes != FP32 and job.device == "cpu" else 0


def saved_by_layer(job: Job) -> int:
    """What one layer keeps for its backward, in the order of the forward."""
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    D, P, E, A = m.hidden_size, m.attention_projection_size, m.num_experts, m.num_experts_per_tok
    keeps_result = _has_attention_kernel(job) or _prefix(job) or _trains(job, "o")
    attention = 3 * P + (P if keeps_result else 0)  # queries, keys, values, result
    moe_input = D + (D if _trains(job, "experts") else 0)  # residual, normed
    rows = T * c * (attention + moe_input)
    scales = 3 * T * FP32
    scores = 3 * E if m.router is RouterKind.attention else E
    router = T * (scores + E + A) * FP32 + 2 * T * A * INT64
    router += 3 * E * D * c if m.router is RouterKind.attention else 0
    own = _filter(job) + rows + _kept_scores(job) + scales + router + _expert_rows(job)
    return own + _changed_weights(job)


def _filter(job: Job) -> int:
    """A layer up to its queries: its input, normed, what the filter keeps, z."""
    m, T = job.model, job.micro_rows * job.seq_len
    D = m.hidden_size
    if _has_filter_kernel(job):
        return job.compute_bytes * T * (2 * D + D // 2 + D + D)  # c, and the norm's input
    # A product keeps its rows for the gradient of its weight only: pairs of conv1 and of conv2.
    pairs = 3 * D if _trains(job, "lfa") else 0
    taps = 2 * D * D  # both convolutions as matrices
    return job.compute_bytes * (T * (2 * D + pairs + D + D) + taps)


def _has_filter_kernel(job: Job) -> bool:
    is_bf16 = job.device == "cpu" and job.compute_bytes == 2
    return is_bf16 and lfa_kernel.fits(torch.bfloat16, job.model.hidden_size)


def _trains(job: Job, role: str) -> bool:
    return not _is_frozen(job) or role in _roles(job)


def _is_frozen(job: Job) -> bool:
    return job.adapter.kind is not AdapterKind.none


def _roles(job: Job) -> tuple[str, ...]:
    """Of the weights that are changed."""
    return job.adapter.targets if job.adapter.kind is AdapterKind.lora else ()


def _prefix(job: Job) -> int:
    """Keys that every query sees besides its own row's."""
    return job.adapter.prompt_tokens if job.adapter.kind is AdapterKind.prefix else 0


def _changed_weights(job: Job) -> int:
    """Of one layer: the weights in use, W + change."""
    if not _is_frozen(job):
        return 0
    m, roles = job.model, set(_roles(job))
    D, P = m.hidden_size, m.attention_projection_size
    projections = 2 * bool(roles & {"q", "k"}) + ("v" in roles) + ("o" in roles)
    experts = 3 * (m.num_experts // job.ep) * m.moe_intermediate_size * D
    convolutions = 2 * D * D  # D -> D / 2 and back, two taps
    return job.compute_bytes * (
        projections * D * P + ("experts" in roles) * experts + ("lfa" in roles) * convolutions
    )


def _kept_scores(job: Job) -> int:
    """Attention probabilities of short rows, block by block, on a CPU whose kernel does not serve;
    of the kernel's a number for each row of scores."""
    L, block = job.seq_len, attention_kernel.BLOCK
    if _has_attention_kernel(job):
        return job.micro_rows * job.model.num_attention_heads * L * FP32
    if n := _prefix(job):  # of torch's kernel as many, the mask as numbers, copies of the prefix
        m, c = job.model, job.compute_bytes
        copies = 2 * n * m.attention_projection_size * c
        return job.micro_rows * (L * (m.num_attention_heads * FP32 + (L + n) * c) + copies)
    if job.device != "cpu" or attention_kernel.KEPT_LENGTH < L:
        return 0
    scores = sum(
        (min(start + block, L) - start) * min(start + block, L) for start in range(0, L, block)
    )
    return job.micro_rows * job.model.num_attention_heads * scores * job.compute_bytes


def _has_attention_kernel(job: Job) -> bool:
    m = job.model
    fits = attention_kernel.fits(torch.bfloat16, m.head_dim) and m.attention_dropout == 0.0
    return job.device == "cpu" and job.compute_bytes == 2 and fits


def has_kernel(job: Job) -> bool:
    """Whether the op of ptm/kernels/moe_mlp.py serves: rows unpadded, read where they are."""
    m = job.model
    return (
        job.device == "cpu"
        and job.compute_bytes == 2
        and moe_kernel.fits(torch.bfloat16, m.hidden_size, m.moe_intermediate_size)
    )


def puts_in_place(job: Job) -> bool:
    """Whether a kernel puts the gradients of experts where they are summed (ptm/kernels/sink.py);
    it cannot those of weights that are computed."""
    return has_kernel(job) and not _is_frozen(job)


def _rows(job: Job) -> int:
    routed = job.micro_rows * job.seq_len * job.model.num_experts_per_tok
    return routed if has_kernel(job) else grouped_rows(routed, job.model.num_experts // job.ep)


def _expert_rows(job: Job) -> int:
    m, c = job.model, job.compute_bytes
    # On CUDA autograd keeps the activation and the product too.
    hidden = (4 if job.device == "cuda" else 2) * m.moe_intermediate_size
    moved = 0 if has_kernel(job) and job.ep == 1 else 2 * m.hidden_size
    return _rows(job) * c * (moved + hidden)


def _experts_backward(job: Job) -> int:
    """The last layer from the backward of its experts on: the larger of two moments.

    Rows are taken as evenly spread; a group of r rows too many adds 4 r F c bytes.
    """
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    D, E, F = m.hidden_size, m.num_experts // job.ep, m.moe_intermediate_size
    R = _rows(job)
    in_place = puts_in_place(job)
    weights, saved = 0 if in_place else 3 * E * F * D * c, saved_by_layer(job)
    widened = 0 if in_place else _widened(job, 2 * E * F * D)
    if has_kernel(job) and job.ep == 1:
        tokens = 2 * T * D * c  # gradients of the block's rows and of the experts' input
        products = saved + tokens + R * D * c + weights
        sums = saved - _expert_rows(job) + tokens + weights + widened
        return max(products, sums)
    rows = R * D * c + T * D * c
    rows += T * m.num_experts_per_tok * D * c if job.ep > 1 else 0  # on their way
    products = saved - R * D * c + rows + R * D * c + weights + 4 * R // E * F * c
    sums = saved - _expert_rows(job) + rows + weights + widened
    return max(products, sums)


def _attention_backward(job: Job) -> int:
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    D, P = m.hidden_size, m.attention_projection_size
    # On the CPU a block's probabilities, unless kept, and their gradients, and the block before.
    kept = _kept_scores(job)
    block = m.num_attention_heads * min(attention_kernel.BLOCK, job.seq_len) * job.seq_len * c
    masks = min(attention_kernel.BLOCK, job.seq_len) * job.seq_len * (c + 1)
    held = (6 if kept else 10) if _is_widened(job) else (3 if kept else 5)
    blocks = held * block + masks if job.device == "cpu" else 0
    if n := _prefix(job):
        # Beside the kernel in fp32: gradients of the result, of q by both parts, their sum; scores.
        wide = FP32 * (4 * P + 2 * m.num_attention_heads * n)
        blocks = T * (P * c + wide if _has_attention_kernel(job) else 2 * P * c)
    elif _has_attention_kernel(job):
        blocks = T * P * c  # gradients of q and k before and after their rotation, and of v
    return _filter(job) + T * c * 3 * P + kept + T * c * (2 * D + 4 * P) + blocks


def _shared(job: Job) -> int:
    """Angles and masks that all layers use."""
    B, L = job.micro_rows, job.seq_len
    mask = B * L * L if job.model.isolate_documents else 0
    return B * L * job.model.rotary_dim * FP32 + mask + 3 * B * L * INT64
