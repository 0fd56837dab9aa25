"""Memory of one rank in closed form: one function for each kind, checked against the allocator.

A step has four moments at which a rank can hold most beside its states, and the plan takes the
largest; in between, and at the embedding in the end, less is held:

    loss       all saved activations, one chunk of logits, the gradient of the head
    head       the same without logits, while the backward scales that gradient
    experts    the backward of the last layer's experts: their rows and their weights' gradients
    attention  that of its attention, which at long sequences makes large blocks of scores

and the update, when no activation is alive, but the gradients of all ranks' shards are. With
recompute=block, layers save their input only and one layer at a time is saved whole.

Symbols: T tokens of a micro-batch, D hidden, P attention width, E experts, A active, F expert
hidden, R rows of experts, V vocabulary, c bytes of the compute format, N ranks.
tests/planner/test_cost.py holds states, activations and update within 5 % of what torch's
allocator counts. What is resident beyond that on a CPU (`buffers`) is measured, not derived. Not
covered: groups of experts far from even (see `_experts_backward`), fragmentation on a GPU, and
whether the formulas hold for CUDA, which is not measured yet.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from ptm.common.plan import Need
from ptm.common.units import KIB, MIB, format_bytes
from ptm.engine.zero1 import NORM_PIECE
from ptm.kernels import attention as attention_kernel
from ptm.kernels import loss as loss_kernel
from ptm.kernels.permute import ALIGN, grouped_rows
from ptm.model.config import ModelConfig, RouterKind, num_parameters
from ptm.model.transformer import Transformer

FP32, INT64 = 4, 8
MASTER_AND_MOMENTS = 12
"""Bytes of fp32 master, first and second moment of a parameter."""

LIBRARIES_BYTES = {"cpu": 330 * MIB, "cuda": 1024 * MIB}
"""Resident code of torch and the rest after start. cpu: measured 2026-11, torch 2.13. cuda:
context, cuBLAS and NCCL as commonly seen; not measured."""
KERNEL_BYTES, MOST_KERNELS = 740 * KIB, 1024
"""oneDNN compiles one bf16 product per shape and keeps the newest 1024: 743 MiB of them, measured
2026-11 on an AMD EPYC (Zen 4)."""
EXPERT_PRODUCTS = 6
"""Matrix products of one expert, forward and backward, whose shape follows the number of rows."""
HEAP_BYTES, MOST_HEAP_BYTES = 60 * MIB, 512 * MIB
"""What malloc keeps for itself on the CPU: this and as much again as the activations, up to a
bound, as it gives blocks above 32 MiB back at once. With it, resident memory of six runs of the
mini and debug scales was within 8 % of the plan (2026-11)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be planned, in plain numbers from the sections of a recipe."""

    model: ModelConfig
    ranks: int
    seq_len: int
    batch_tokens: int
    micro_batch_size: int
    precision: str
    recompute: str
    bucket_bytes: int
    has_snapshot: bool
    """Whether checkpoints are written in the background, from a copy."""
    device: str

    @property
    def compute_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    @property
    def rank_rows(self) -> int:
        """Rows of a step on the rank that has most."""
        return max(1, -(-(self.batch_tokens // self.seq_len) // self.ranks))

    @property
    def micro_rows(self) -> int:
        return min(self.micro_batch_size, self.rank_rows)


def needs(job: Job) -> tuple[Need, ...]:
    """Everything one rank holds at its worst moment, by kind."""
    count, c, N = f"{num_parameters(job.model):,}", job.compute_bytes, job.ranks
    padded = (
        "" if gradients(job) == num_parameters(job.model) * FP32 else ", padded to equal shards"
    )
    parts = {name: size for name, size in buffers(job).items() if size}
    held = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    rows = f"{job.micro_rows:,} rows x {job.seq_len:,} tokens, recompute {job.recompute}"
    return (
        Need(
            kind="parameters", size_bytes=parameters(job), why=f"{count} x {c} B, {job.precision}"
        ),
        Need(kind="gradients", size_bytes=gradients(job), why=f"{count} x 4 B, fp32{padded}"),
        Need(
            kind="optimizer states",
            size_bytes=optimizer_states(job),
            why=f"{count} x 12 B over {N:,} ranks: master and two moments{padded}",
        ),
        Need(kind="activations", size_bytes=activations(job), why=rows),
        Need(kind="buffers", size_bytes=sum(parts.values()), why=held),
    )


def parameters(job: Job) -> int:
    """A full copy in the compute format on every rank."""
    return num_parameters(job.model) * job.compute_bytes


def gradients(job: Job) -> int:
    """The fp32 sums of all micro-batches, in N equal pieces, so short pieces are padded."""
    return sum(job.ranks * size for size in _shard_sizes(job)) * FP32


def optimizer_states(job: Job) -> int:
    """This rank's pieces of master and moments."""
    return sum(_shard_sizes(job)) * MASTER_AND_MOMENTS


def activations(job: Job) -> int:
    """The most that forward and backward of one micro-batch hold beside the states."""
    return max(_moments(job).values())


def _moments(job: Job) -> dict[str, int]:
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    D, V, layers = m.hidden_size, m.vocab_size, m.num_hidden_layers
    row_bytes, head, head_fp32 = T * D * c, V * D * c, V * D * FP32
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
    """Logits of one chunk of tokens, and beside them fp32 slices or their gradient for the head."""
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    V = m.vocab_size
    chunk = min(T, loss_kernel.chunk_tokens(V))
    slices = 2 * min(max(1, loss_kernel.SLICE_LOGITS // V), chunk) * V * FP32
    head = V * m.hidden_size
    return chunk * V * c + max(slices, head * c + _widened(job, head))


def _widened(job: Job, count: int) -> int:
    """Torch's copy of a bf16 tensor in fp32, made whole on the CPU to add it to an fp32 one."""
    return count * FP32 if job.compute_bytes != FP32 and job.device == "cpu" else 0


def saved_by_layer(job: Job) -> int:
    """What one layer keeps for its backward, in the order of the forward."""
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    D, P, E, A = m.hidden_size, m.attention_projection_size, m.num_experts, m.num_experts_per_tok
    filtered = D + D + 2 * D + D + D + D  # input, normed, pairs of conv1, of conv2, sum, z
    attention = 4 * P  # queries, keys, values, result
    moe_input = D + D  # residual, normed
    rows = T * c * (filtered + attention + moe_input)
    taps = 2 * D * D * c  # both convolutions as matrices
    scales = 3 * T * FP32
    scores = 3 * E if m.router is RouterKind.attention else E
    router = T * (scores + E + A) * FP32 + 2 * T * A * INT64
    router += 3 * E * D * c if m.router is RouterKind.attention else 0
    return rows + _kept_scores(job) + taps + scales + router + _expert_rows(job)


def _kept_scores(job: Job) -> int:
    """Attention probabilities that the CPU kernel keeps of short rows, block by block."""
    L, block = job.seq_len, attention_kernel.BLOCK
    if job.device != "cpu" or attention_kernel.KEPT_LENGTH < L:
        return 0
    scores = sum(
        (min(start + block, L) - start) * min(start + block, L) for start in range(0, L, block)
    )
    return job.micro_rows * job.model.num_attention_heads * scores * job.compute_bytes


def _expert_rows(job: Job) -> int:
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    R = grouped_rows(T * m.num_experts_per_tok, m.num_experts)
    # On CUDA autograd keeps the activation and the product too.
    hidden = (4 if job.device == "cuda" else 2) * m.moe_intermediate_size
    return R * c * (2 * m.hidden_size + hidden)


def _experts_backward(job: Job) -> int:
    """The last layer from the backward of its experts on: the larger of two moments.

    Rows are taken as evenly spread; a group of r rows too many adds 4 r F c bytes.
    """
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    D, E, F = m.hidden_size, m.num_experts, m.moe_intermediate_size
    R = grouped_rows(T * m.num_experts_per_tok, E)
    saved, rows = saved_by_layer(job), R * D * c + T * D * c
    weights = 3 * E * F * D * c
    products = saved - R * D * c + rows + R * D * c + weights + 4 * R // E * F * c
    sums = saved - _expert_rows(job) + rows + weights + _widened(job, 2 * E * F * D)
    return max(products, sums)


def _attention_backward(job: Job) -> int:
    m, c, T = job.model, job.compute_bytes, job.micro_rows * job.seq_len
    D, P = m.hidden_size, m.attention_projection_size
    # On the CPU a block's probabilities, unless kept, and their gradients, and the block before.
    kept = _kept_scores(job)
    block = m.num_attention_heads * min(attention_kernel.BLOCK, job.seq_len) * job.seq_len * c
    blocks = (3 if kept else 5) * block if job.device == "cpu" else 0
    return T * c * (7 * D + 3 * P) + kept + 2 * D * D * c + T * c * (2 * D + 4 * P) + blocks


def _shared(job: Job) -> int:
    """Angles and masks that all layers use."""
    B, L = job.micro_rows, job.seq_len
    mask = B * L * L if job.model.isolate_documents else 0
    return B * L * job.model.rotary_dim * FP32 + mask + 3 * B * L * INT64


def update(job: Job) -> int:
    """The most that the optimizer step holds beside the states."""
    largest, c, N = max(_shard_sizes(job)), job.compute_bytes, job.ranks
    squares = min(largest, NORM_PIECE) * 2 * FP32
    exchanged = largest * N * FP32 if N > 1 else 0
    published = largest * c if c != FP32 else 0
    gathered = 2 * largest * N * c if N > 1 else 0
    return received(job) + max(squares, exchanged, published + gathered)


def received(job: Job) -> int:
    """Summed gradients of this rank's shards, held until the update has used them."""
    return sum(_shard_sizes(job)) * FP32 if job.ranks > 1 else 0


def buffers(job: Job) -> dict[str, int]:
    """What is neither state nor activation, by name."""
    copied = sum(_shard_sizes(job)) * MASTER_AND_MOMENTS if job.has_snapshot else 0
    # Labels, positions, documents, ids and mask of this step's rows and of the prefetched ones.
    batches = 2 * job.rank_rows * job.seq_len * (4 * INT64 + 1)
    is_cpu = job.device == "cpu"
    shapes_of_rows = EXPERT_PRODUCTS * job.micro_rows * job.seq_len // ALIGN
    has_kernels = is_cpu and job.compute_bytes != FP32
    return {
        "libraries": LIBRARIES_BYTES[job.device],
        "compiled products": has_kernels * KERNEL_BYTES * min(MOST_KERNELS, shapes_of_rows),
        "heap": is_cpu * min(MOST_HEAP_BYTES, HEAP_BYTES + activations(job)),
        "update beyond activations": max(0, update(job) - activations(job)),
        "copy for saving": copied,
        "batches": batches,
    }


def _shard_sizes(job: Job) -> list[int]:
    """Parameters of each bucket that one rank owns, padding included."""
    return _bucket_shards(job.model, job.ranks, job.bucket_bytes)


@functools.lru_cache(maxsize=4096)
def _bucket_shards(model: ModelConfig, ranks: int, bucket_bytes: int) -> list[int]:
    found = []
    for is_matrix in (True, False):
        shard = held_bytes = 0
        for shape in shapes(model):
            if (len(shape) > 1) != is_matrix:
                continue
            shard += -(-shape[0] // ranks) * math.prod(shape[1:])
            held_bytes += math.prod(shape) * FP32
            if held_bytes >= bucket_bytes:
                found.append(shard)
                shard = held_bytes = 0
        if shard:
            found.append(shard)
    return found


def shapes(model: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of all parameters in order, from a model of one layer without memory."""
    one = _one_layer(replace(model, num_hidden_layers=1))
    layer = [shape for name, shape in one if name.startswith("model.layers.0.")]
    first = [name for name, _ in one].index(next(n for n, _ in one if ".layers.0." in n))
    before = [shape for _, shape in one[:first]]
    after = [shape for _, shape in one[first + len(layer) :]]
    return before + layer * model.num_hidden_layers + after


@functools.lru_cache(maxsize=1024)
def _one_layer(model: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    named = Transformer(model, device="meta").named_parameters()
    return [(name, tuple(parameter.shape)) for name, parameter in named]
