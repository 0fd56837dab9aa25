"""Seconds of one step of one rank, in closed form.

    compute      FLOPs of each kind over the rate of that kind, or blocks timed on this machine
    gather       whole weights, and sums of gradients: bytes over the link, and a latency each
    experts      rows to the ranks of their experts and back
    copies       weights out of pages, gradients into them, norms: bytes over memory
    update       parameters of this rank over the optimizer's rate
    disk         pages that are not in memory; on a GPU, those in the host's go over its link

On a GPU, gathering and pages travel beside computing, so the longest of them counts; rows of
experts are waited for, but for pieces of them (engine.chunks). On a CPU all of them take the same
cores, and only the disk works beside them. Two things are left out on purpose: ranks waiting for
the slowest one, and evaluation and saving, which are not part of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ptm.common.plan import Spent
from ptm.common.units import format_bytes
from ptm.engine.layout import Group
from ptm.kernels.permute import grouped_rows
from ptm.planner import states
from ptm.planner.activations import puts_in_place
from ptm.planner.job import Job
from ptm.planner.speed import Speed

WATCHED_S = 3.5e-3
"""Python beside a block that is run again: both times it is watched operator by operator for the
choices that are kept (ptm/parallel/recompute.py). Measured on one core of a Sapphire Rapids at
widths of 64 and 256, 3.6 and 3.5 ms (2026-11); on a GPU it runs while that works."""

HOOK_S = 80e-6
"""The engine's Python for a parameter in a micro-batch, beside what is timed with the blocks: 54 to
94 us on one core of a Sapphire Rapids, as busy as others make it (2026-11, debug scale)."""


class Placed(NamedTuple):
    """Pages of one rank by where they are."""

    gpu: int
    cpu: int
    ssd: int

    @property
    def total(self) -> int:
        return self.gpu + self.cpu + self.ssd


class Wire(NamedTuple):
    """Bytes that one rank sends in a step, and collectives it takes part in."""

    gather_bytes: float
    sum_bytes: float
    expert_bytes: float
    calls: int
    expert_calls: int

    @property
    def total_bytes(self) -> float:
        return self.gather_bytes + self.sum_bytes + self.expert_bytes


def spent(job: Job, speed: Speed, placed: Placed, *, ranks_per_node: int) -> tuple[Spent, ...]:
    """Seconds by kind. Those that run beside computing have `is_hidden`."""
    wire = wire_of(job)
    is_gpu = job.device == "cuda"
    is_far = job.ranks > ranks_per_node
    collective_s = (wire.gather_bytes + wire.sum_bytes) / (speed.network if is_far else speed.link)
    expert_link = speed.network if job.ep > ranks_per_node else speed.link
    experts_s = wire.expert_bytes / expert_link + wire.expert_calls * speed.latency
    chunks = min(job.chunks, max(1, job.model.num_experts // job.ep)) if is_gpu else 1
    disk_s, disk_bytes = _disk(job, speed, placed)
    found = [
        Spent("computing", _compute_s(job, speed), _computing(job), False),
        Spent(
            "weights and gradients",
            (collective_s + wire.calls * speed.latency) * speed.slowdown,
            f"{format_bytes(wire.gather_bytes + wire.sum_bytes)} in {wire.calls:,} collectives",
            is_gpu,
        ),
        Spent(
            "rows of experts",
            experts_s * speed.slowdown / chunks,
            f"{format_bytes(wire.expert_bytes)} in {wire.expert_calls:,} exchanges",
            False,
        ),
        Spent("copies", _copies_s(job, speed), "weights out of pages, gradients into them", False),
        Spent("update", _update_s(job, speed, placed), _updating(job, placed), False),
        Spent("disk", disk_s, format_bytes(disk_bytes), True),
    ]
    if is_gpu and placed.cpu + placed.ssd:
        moved = _moved_bytes(job, placed)
        found.append(Spent("host to device", moved / speed.host, format_bytes(moved), True))
    return tuple(s for s in found if s.seconds)


def step_s(times: tuple[Spent, ...]) -> float:
    """Hidden kinds go on while computing does, each on a link of its own."""
    computing = sum(s.seconds for s in times if s.what in ("computing", "copies"))
    others = sum(s.seconds for s in times if not s.is_hidden) - computing
    hidden = max((s.seconds for s in times if s.is_hidden and s.what != "disk"), default=0.0)
    disk = max((s.seconds for s in times if s.what == "disk"), default=0.0)
    return max(max(computing, hidden) + others, disk)


# Computing.


def flops(job: Job) -> dict[str, float]:
    """FLOPs of the forward of one micro-batch, by kind."""
    m, T = job.model, job.micro_tokens
    D, P, E = m.hidden_size, m.attention_projection_size, m.num_experts
    padded = _average_rows(job)
    return {
        "dense": 2.0 * T * m.num_hidden_layers * (4 * D * P + 2 * D * D + 3 * E * D),
        "experts": 2.0 * padded * m.num_hidden_layers * 3 * D * m.moe_intermediate_size,
        "attention": 2.0 * T * m.num_hidden_layers * P * job.seq_len,
        "head": 2.0 * T * m.vocab_size * D,
    }


def _average_rows(job: Job) -> float:
    """Rows through this rank's experts, half of the possible filling among them."""
    rows = job.micro_tokens * job.model.num_experts_per_tok
    most = grouped_rows(rows, max(1, job.model.num_experts // job.ep))
    return (rows + most) / 2


def _compute_s(job: Job, speed: Speed) -> float:
    again = job.recompute == "block"
    layers = job.model.num_hidden_layers
    if (timed := speed.timed) is not None:
        block = timed.block_forward_s * (1 + again) + timed.block_backward_s
        one = layers * block + timed.root_forward_s + timed.root_backward_s
        one *= job.micro_tokens / timed.tokens
    else:
        one = sum(
            count * (3 + again * (kind != "head")) / speed.rate(job.precision, kind)
            for kind, count in flops(job).items()
        )
    if again and job.device == "cpu":
        one += layers * WATCHED_S
    return one * job.micro_batches * speed.slowdown


def _computing(job: Job) -> str:
    again = ", blocks forward twice" if job.recompute == "block" else ""
    total = 3 * sum(flops(job).values()) * job.micro_batches
    return f"{total / 1e12:,.1f} TFLOP in {job.micro_batches:,} micro-batches{again}"


# The wire.


def wire_of(job: Job) -> Wire:
    """What this rank sends, as ptm/engine/weights.py, grads.py and ptm/parallel/expert.py do it."""
    placed = states.layout(job)
    M, layers, c = job.micro_batches, job.model.num_hidden_layers, job.compute_bytes
    root, block = placed.units[0], placed.units[1]
    root_gathers, block_gathers = 1, layers
    if job.zero == 3:
        # The last block of a forward stays for its backward, the first for the next forward.
        block_gathers = M * (2 * layers - 2) + 1
    sums, width = (1, 4) if job.zero == 1 else (M, c)
    gathered = root_gathers * _sent(job, root.groups) + block_gathers * _sent(job, block.groups)
    summed = sums * (_sent(job, root.trained) + layers * _sent(job, block.trained))
    calls = root_gathers * len(root.groups) + block_gathers * len(block.groups)
    calls += sums * (len(root.trained) + layers * len(block.trained))
    trips = 6 if job.recompute == "block" else 4
    exchanges = M * layers * trips if job.ep > 1 else 0
    rows = job.micro_tokens * job.model.num_experts_per_tok * (job.ep - 1) / job.ep
    rows_bytes = exchanges * rows * job.model.hidden_size * c
    return Wire(c * gathered, width * summed, rows_bytes, calls if job.ranks > 1 else 0, exchanges)


def _sent(job: Job, groups: Sequence[Group]) -> float:
    """Elements that a rank sends to gather groups once, or to sum them once."""
    dense, experts = states.parts(groups)
    replicas = job.ranks // job.ep
    return dense * (job.ranks - 1) / job.ranks + experts * (replicas - 1) / replicas


# Copies, the update and pages.


def _copies_s(job: Job, speed: Speed) -> float:
    """On a GPU the hooks run while it works."""
    num = sum(len(group.slots) for unit in states.layout(job).units for group in unit.groups)
    hooks_s = HOOK_S * num * job.micro_batches if job.device == "cpu" else 0.0
    copied = _copied_bytes(job, is_timed=speed.timed is not None)
    return (copied / speed.memory + hooks_s) * speed.slowdown


def _copied_bytes(job: Job, *, is_timed: bool) -> float:
    """Bytes read and written by the engine itself in a step. is_timed: the blocks were, with their
    gradients on the way into buffers."""
    placed = states.layout(job)
    c, owned, M = job.compute_bytes, placed.trained, job.micro_batches
    local = sum(unit.trained_numel for unit in placed.units)
    passes = 2 * M if job.zero == 3 else 1
    weights = 2 * c * placed.numel * passes
    in_place = _experts_numel(job) if puts_in_place(job) else 0
    sums = 1 if job.zero == 1 and job.ranks > 1 else M
    arrived = 0 if is_timed else (local - in_place) * 2 * c * M
    if job.zero == 1 and job.ranks > 1:
        # In fp32 where they are, over what is there or added to it, and not in c bytes elsewhere.
        arrived += (local - in_place) * (8 - c) * M + in_place * (4 - c + (8 - c) * (M - 1))
        landed = owned * (4 * job.ranks + 12)
    else:
        landed = owned * sums * (c * job.ranks + 8) + owned * 4
    return weights + arrived + landed


def _experts_numel(job: Job) -> int:
    """Of this rank's experts, in all layers."""
    m = job.model
    one = 3 * m.hidden_size * m.moe_intermediate_size
    return m.num_hidden_layers * (m.num_experts // job.ep) * one


def _update_s(job: Job, speed: Speed, placed: Placed) -> float:
    owned = states.layout(job).trained
    on_gpu = placed.gpu / placed.total if placed.total else 0.0
    if job.device == "cpu":
        return owned / speed.host_adam * speed.slowdown
    return owned * max(on_gpu / speed.adam, (1 - on_gpu) / speed.host_adam)


def _updating(job: Job, placed: Placed) -> str:
    share = f", {placed.gpu / placed.total:.0%} on the device" if job.device == "cuda" else ""
    return f"{states.layout(job).trained:,} parameters of this rank{share}"


def _disk(job: Job, speed: Speed, placed: Placed) -> tuple[float, float]:
    """Seconds and bytes of pages that come and go: the share that is never in memory, for every
    use of a page, and what a commit writes besides."""
    if not job.has_ssd:
        return 0.0, 0.0
    pages, page = states.page_map(job), job.page_bytes
    weights, grads, durable = pages.weights.num_pages, pages.grads.num_pages, len(pages.durable)
    absent, M = placed.ssd / placed.total, job.micro_batches
    passes = 2 * M if job.zero == 3 else 1
    read = absent * (passes * weights + M * grads + durable + grads)
    written = absent * (M * grads + durable) + (1 - absent) * durable / job.journal_every
    seconds = read * page / speed.ssd_read + written * page / speed.ssd_write
    return seconds, (read + written) * page


def _moved_bytes(job: Job, placed: Placed) -> float:
    """Bytes over the link of host and device: weights up, gradient sums down."""
    share = (placed.cpu + placed.ssd) / placed.total
    placed_on, M = states.layout(job), job.micro_batches
    passes = 2 * M if job.zero == 3 else 1
    sums = 1 if job.zero == 1 else M
    return share * (placed_on.numel * job.compute_bytes * passes + placed_on.trained * 4 * sums)
