"""The price of a job on a machine: its memory, its seconds, and the best of its open choices.

What a recipe leaves open is `engine.zero: 0`: 1, 2 and 3 are priced, and of those that fit the
fastest wins on a machine that is described. On one whose speed was measured, or is not known, it is
the lowest, which sends least: stages add gradients in different orders, so a choice by a clock
would make of the same recipe another run, in its last bits, from one day to the next. What the
recipe says is kept. Other ways (experts over more ranks, recompute, micro-batches) are priced
beside it and shown as advice, with what they lose by: the number that does not fit, or the slower
step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ptm.common.plan import Option, Plan
from ptm.common.units import format_bytes
from ptm.model.config import active_parameters, flops_per_token, num_parameters
from ptm.planner import states
from ptm.planner.hardware import Hardware
from ptm.planner.job import Job, trained
from ptm.planner.memory import COPIED_BYTES, Memory, memory, tier_bytes
from ptm.planner.step_time import spent, step_s, wire_of

STAGES = (1, 2, 3)
_MOST_OPTIONS = 8
_SLOWER = 0.005


class Priced(NamedTuple):
    """A job with its `zero` settled, what it takes, and how long a step is."""

    job: Job
    memory: Memory
    step_s: float | None

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Smaller is better: what fits, then the fastest; without speeds, the lowest `zero`."""
        short = self.memory.worst.needed_bytes - self.memory.worst.there_bytes
        if not self.memory.fits:
            return (True, short, 0.0)
        return (False, self.step_s or 0.0, self.job.zero)


def price(job: Job, hardware: Hardware) -> Priced:
    """The best of the job's open choices, or the one that comes nearest to fitting."""
    found = stages(job, hardware)
    lowest = next((priced for priced in found if priced.memory.fits), None)
    if lowest is not None and hardware.speed is not None and hardware.speed.is_measured:
        return lowest
    return min(found, key=lambda priced: priced.rank)


def stages(job: Job, hardware: Hardware) -> list[Priced]:
    """The job as it is, or with every `zero` where that is open."""
    chosen = _open_stages(job) if job.zero == 0 else (job.zero,)
    return [_price(replace(job, zero=zero), hardware) for zero in chosen]


def _open_stages(job: Job) -> tuple[int, ...]:
    """Below 3 units keep whole weights, which is what codes are held against."""
    return (3,) if job.adapter.has_codes else STAGES


def _price(job: Job, hardware: Hardware) -> Priced:
    found = memory(job, hardware)
    if hardware.speed is None:
        return Priced(job, found, None)
    times = spent(job, hardware.speed, found.placed, ranks_per_node=hardware.ranks_per_node)
    return Priced(job, found, step_s(times))


def plan_of(job: Job, hardware: Hardware, *, is_compared: bool = False) -> Plan:
    """The plan of a job, whether it fits or not; is_compared: with other ways to run it."""
    best = price(job, hardware)
    job, found = best.job, best.memory
    wire = wire_of(job)
    speed, times = hardware.speed, ()
    if speed is not None:
        times = spent(job, speed, found.placed, ranks_per_node=hardware.ranks_per_node)
    told = ""
    if job.ranks > 1:
        experts = f", {format_bytes(wire.expert_bytes)} rows of experts" if job.ep > 1 else ""
        told = (
            f": {format_bytes(wire.gather_bytes)} weights, {format_bytes(wire.sum_bytes)} "
            f"gradients{experts}"
        )
    return Plan(
        scale=job.model.scale.value,
        ranks=job.ranks,
        num_parameters=num_parameters(job.model),
        active_parameters=active_parameters(job.model),
        flops_per_token=flops_per_token(job.model, job.seq_len),
        seq_len=job.seq_len,
        batch_tokens=job.batch_tokens,
        micro_batch_size=job.micro_rows,
        micro_batches=job.micro_batches,
        precision=job.precision,
        recompute=job.recompute,
        zero=job.zero,
        ep=job.ep,
        needs=found.needs,
        tiers=found.tiers,
        tier_bytes=tier_bytes(job, found.placed),
        page_waste=states.page_map(job).waste,
        angel_waste=states.angel_waste(job),
        machine=machines(job.ranks, hardware),
        checkpoint_bytes=trained(job) * COPIED_BYTES,
        spent=times,
        step_s=best.step_s,
        wire_bytes=wire.total_bytes,
        wire_why=told,
        speed_why=hardware.speed_why,
        options=tuple(options(best, hardware)) if is_compared else (),
    )


def machines(ranks: int, hardware: Hardware) -> str:
    count = -(-ranks // hardware.ranks_per_node)
    return hardware.name if count == 1 else f"{count:,} machines ({hardware.name})"


def options(best: Priced, hardware: Hardware) -> list[Option]:
    """Other ways to run the recipe: stages that lost, and what other keys would bring."""
    job = best.job
    ways = [
        (f"engine.zero={zero}", _price(replace(job, zero=zero), hardware))
        for zero in _open_stages(job)
        if zero != job.zero
    ]
    for words, other in _neighbours(job):
        ways.append((words, price(replace(other, zero=0), hardware)))
        found = ways[-1][1].job.zero
        if found != job.zero:
            ways[-1] = (f"{words} engine.zero={found}", ways[-1][1])
    ways.sort(key=lambda way: way[1].rank)
    kept = [way for way in ways if way[1].memory.fits][: _MOST_OPTIONS - 2]
    kept += [way for way in ways if not way[1].memory.fits][: _MOST_OPTIONS - len(kept)]
    return [
        Option(words, other.memory.tiers[0].needed_bytes, other.step_s, _verdict(other, best))
        for words, other in kept
    ]


def _neighbours(job: Job) -> Iterator[tuple[str, Job]]:
    """Ways that change one or two keys of the recipe and nothing of what is learned."""
    most = math.gcd(job.ranks, job.model.num_experts)
    eps = [ep for ep in range(1, most + 1) if most % ep == 0]
    sizes = sorted({1, job.micro_rows * 2, job.micro_rows * 4, job.micro_rows})
    sizes = [size for size in sizes if size <= job.rank_rows]
    for ep, again, size in itertools.product(eps, ("none", "block"), sizes):
        other = replace(job, ep=ep, recompute=again, micro_batch_size=size)
        words = [
            *([f"engine.ep={ep}"] if ep != job.ep else []),
            *([f"train.recompute={again}"] if again != job.recompute else []),
            *([f"train.micro_batch_size={size}"] if size != job.micro_rows else []),
        ]
        if 0 < len(words) <= 2:
            yield " ".join(words), other


def _verdict(other: Priced, best: Priced) -> str:
    if not other.memory.fits:
        worst = other.memory.worst
        short = format_bytes(worst.needed_bytes - worst.there_bytes)
        return f"{worst.name}: {short} more than is there"
    if other.step_s is None or best.step_s is None:
        return "fits, sends more" if other.job.zero > best.job.zero else "fits"
    ratio = other.step_s / best.step_s
    if abs(ratio - 1) < _SLOWER:
        return "as fast"
    return f"{ratio - 1:.0%} slower" if ratio > 1 else f"{1 - ratio:.0%} faster"
