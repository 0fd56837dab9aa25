"""Memory of the engine that goes when the paged one is whole (ptm/engine/zero1.py)."""

from __future__ import annotations

import functools
import math

from ptm.common.units import KIB, MIB
from ptm.engine.zero1 import NORM_PIECE
from ptm.kernels.permute import ALIGN
from ptm.model.config import ModelConfig, num_parameters
from ptm.planner.activations import activations
from ptm.planner.job import Job, shapes

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


def parameters(job: Job) -> int:
    """A full copy in the compute format on every rank."""
    return num_parameters(job.model) * job.compute_bytes


def gradients(job: Job) -> int:
    """The fp32 sums of all micro-batches, in N equal pieces, so short pieces are padded."""
    return sum(job.ranks * size for size in _shard_sizes(job)) * FP32


def optimizer_states(job: Job) -> int:
    """This rank's pieces of master and moments."""
    return sum(_shard_sizes(job)) * MASTER_AND_MOMENTS


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
    return sum(_shard_sizes(job)) * FP32


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
