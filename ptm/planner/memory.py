"""Memory of one rank: what it needs of each tier, and how its pages are placed.

    device   frames of gathered weights, gradients on their way, activations, buffers
             (on a CPU that is the host's memory: there is no other)
    pages    on a GPU first in what is left of the device, then in the host's memory, then on disk

tests/planner/test_memory.py holds states and activations within 2 % of what torch's allocator
counts. What is resident beyond that on a CPU (`buffers`) is measured, not derived.
"""

from __future__ import annotations

from typing import NamedTuple

from ptm.common.plan import Need, Tier
from ptm.common.units import KIB, MIB, format_bytes
from ptm.engine.layout import PageMap
from ptm.kernels.moe_ep_mlp import rows_for, window_bytes
from ptm.kernels.permute import ALIGN
from ptm.kernels.shm import ROOM_BYTES
from ptm.model.config import num_parameters
from ptm.planner import states
from ptm.planner.activations import FP32, INT64, activations, has_kernel
from ptm.planner.hardware import Hardware
from ptm.planner.job import Job
from ptm.planner.step_time import Placed

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
SPARE = 0.03
"""Share of a GPU's memory that is left free of pages, for what an allocator cannot use. A guess."""
COPIED_BYTES = 12
"""Of a parameter in a checkpoint: fp32 master and two moments."""


class Memory(NamedTuple):
    """What a job needs on a machine, and where its pages go."""

    needs: tuple[Need, ...]
    tiers: tuple[Tier, ...]
    placed: Placed

    @property
    def fits(self) -> bool:
        return all(tier.fits for tier in self.tiers)

    @property
    def worst(self) -> Tier:
        """The tier that is short of most, or has least left."""
        return max(self.tiers, key=lambda tier: tier.needed_bytes - tier.there_bytes)


def memory(job: Job, hardware: Hardware) -> Memory:
    """The least that the job can run with, and beyond that as many pages as near as there is
    room."""
    fixed = _fixed(job)
    pages = states.page_map(job)
    copy = _copy_for_saving(job)
    beside = sum(need.size_bytes for need in fixed)
    if job.device == "cpu":
        room = hardware.rank_bytes - beside - sum(need.size_bytes for need in copy)
        budget = None if job.cpu_bytes is None else job.cpu_bytes - _frames(job)
        placed = _placed(job, pages, gpu=0, cpu=_within(room, budget))
        on_host = _pages(job, "cpu", placed.cpu, pages)
        main = Tier.of("cpu", (*on_host, *fixed, *copy), hardware.rank_bytes, hardware.why)
        tiers = [main]
        if job.cpu_bytes is not None:
            within = (need for need in fixed if need.kind in ("weights", "gradients"))
            budget_tier = Tier.of("budget", (*on_host, *within), job.cpu_bytes, "engine.cpu_bytes")
            tiers.append(budget_tier)
        needs = [*on_host, *fixed, *copy]
    else:
        spare = int(hardware.rank_bytes * SPARE)
        room = _within(hardware.rank_bytes - beside - spare, job.gpu_bytes)
        host_room = hardware.host_bytes - sum(need.size_bytes for need in copy)
        placed = _placed(job, pages, gpu=room, cpu=_within(host_room, job.cpu_bytes))
        on_gpu = _pages(job, "gpu", placed.gpu, pages)
        on_host = _pages(job, "cpu", placed.cpu, pages)
        tiers = [
            Tier.of("gpu", (*on_gpu, *fixed), hardware.rank_bytes, hardware.why),
            Tier.of("cpu", (*on_host, *copy), hardware.host_bytes, hardware.host_why),
        ]
        needs = [*on_gpu, *fixed, *on_host, *copy]
    if job.has_ssd:
        size = states.ssd_bytes(job)
        file = Need("page file", size, "two versions of each page that changes", "ssd")
        there = job.ssd_bytes if job.ssd_bytes is not None else hardware.ssd_bytes
        why = "engine.ssd_bytes" if job.ssd_bytes is not None else hardware.ssd_why
        tiers.append(Tier.of("ssd", (file,), there, why))
        needs.append(file)
    return Memory(tuple(needs), tuple(tiers), placed)


def tier_bytes(job: Job, placed: Placed) -> dict[str, int]:
    """Budgets as the engine's keys count them: frames beside pages are part of cpu_bytes."""
    beside = _frames(job) if job.device == "cpu" else 0
    return {
        "gpu": placed.gpu * job.page_bytes,
        "cpu": placed.cpu * job.page_bytes + beside,
        "ssd": states.ssd_bytes(job) if job.has_ssd else 0,
    }


def _frames(job: Job) -> int:
    """Bytes in memory beside pages that engine.cpu_bytes counts too."""
    return states.gathered(job) + states.summed(job)


def _within(room: int, budget: int | None) -> int:
    return max(0, room if budget is None else budget)


def _placed(job: Job, pages: PageMap, *, gpu: int, cpu: int) -> Placed:
    """Pages go as near as there is room; what fits nowhere is counted in the host's memory."""
    page, left = job.page_bytes, pages.num_pages
    on_gpu = min(left, gpu // page) if job.device == "cuda" else 0
    left -= on_gpu
    least = min(left, states.fewest_frames(job)) if job.has_ssd else left
    on_cpu = max(least, min(left, cpu // page))
    return Placed(on_gpu, on_cpu, left - on_cpu)


def _pages(job: Job, tier: str, count: int, pages: PageMap) -> list[Need]:
    if not count:
        return []
    fmt = job.format
    state = fmt.state_block_bytes / 128
    shown = f"{fmt.weight_bytes} + {state:g} + {FP32} B, {pages.numel:,} parameters of this rank"
    if pages.trained < pages.numel:
        kept = f"{pages.numel:,} parameters of this rank"
        if job.adapter.has_codes:
            kept = f"{pages.numel:,} of this rank, experts as {job.adapter.base} with their scales"
        shown = f"{fmt.weight_bytes} B, {kept}; {state:g} + {FP32} B, {pages.trained:,} trained"
    share = "" if count == pages.num_pages else f"{count:,} of {pages.num_pages:,} pages: "
    return [Need("pages", count * job.page_bytes, share + shown, tier)]


def _fixed(job: Job) -> list[Need]:
    """All but pages and the copy for saving."""
    tier = "gpu" if job.device == "cuda" else "cpu"
    whole = "root and two blocks" if job.zero == 3 else "all of them"
    moving = "fp32 sums of all" if job.zero == 1 and job.ranks > 1 else "of units on their way"
    parts = {name: size for name, size in buffers(job).items() if size}
    held = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    rows = f"{job.micro_rows:,} rows x {job.seq_len:,} tokens, recompute {job.recompute}"
    local = f", {job.model.num_experts // job.ep} experts a layer" if job.ep > 1 else ""
    copy = num_parameters(job.model) * job.compute_bytes
    copies = [Need("frozen copy", copy, f"of the whole model, for {job.frozen_copy}", tier)]
    return [
        *(copies if job.frozen_copy else ()),
        Need("weights", states.gathered(job), f"{whole}, {job.precision}{local}", tier),
        Need("gradients", states.summed(job), moving, tier),
        Need("activations", activations(job), rows, tier),
        Need("buffers", sum(parts.values()), held, tier),
    ]


def _copy_for_saving(job: Job) -> list[Need]:
    """Background checkpoints are written from a copy in the host's memory."""
    if not job.has_snapshot:
        return []
    size = states.layout(job).trained * COPIED_BYTES
    return [Need("copy for saving", size, "checkpoint.background", "cpu")]


def buffers(job: Job) -> dict[str, int]:
    """What is neither state nor activation, by name."""
    # Labels, positions, documents, ids and mask of this step's rows and of the prefetched ones.
    batches = 2 * job.rank_rows * job.seq_len * (4 * INT64 + 1)
    is_cpu = job.device == "cpu"
    shapes_of_rows = EXPERT_PRODUCTS * job.micro_rows * job.seq_len // ALIGN
    has_kernels = is_cpu and job.compute_bytes != FP32
    return {
        "libraries": LIBRARIES_BYTES[job.device],
        "compiled products": has_kernels * KERNEL_BYTES * min(MOST_KERNELS, shapes_of_rows),
        "heap": is_cpu * min(MOST_HEAP_BYTES, HEAP_BYTES + activations(job)),
        "update": states.UPDATE_BYTES,
        "batches": batches,
        **shared(job),
    }


def shared(job: Job) -> dict[str, int]:
    """This rank's part of what ranks of a machine share: rings of each axis, and the windows of
    its tokens for experts elsewhere."""
    m, per_node = job.model, job.shared_ranks
    is_one = 1 < job.ranks <= per_node
    has_ep = job.ep > 1 and per_node > 0 and (is_one or per_node % job.ep == 0)
    axes = (3 if 1 < job.ep < job.ranks else 1) if is_one else has_ep
    rows = rows_for(job.micro_tokens) if has_ep and has_kernel(job) else 0
    windows = window_bytes(1, rows, m.num_experts_per_tok, m.hidden_size)
    return {"rings": 2 * ROOM_BYTES * axes, "windows": windows}
