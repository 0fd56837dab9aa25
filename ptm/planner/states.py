"""Weights, gradients and optimizer states of one rank: the engine's own layout and budget, for a
rank that is not there.

The rank is the one that owns most. All blocks of a model are alike, so one block is placed and
counted as often as there are layers: a plan for 4,096 ranks takes milliseconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ptm.engine import budget
from ptm.engine.layout import ALIGN, Group, Layout, PageMap, Unit, make_layout
from ptm.engine.states import CHUNK
from ptm.model.config import ModelConfig
from ptm.model.lora_config import AdapterConfig
from ptm.planner.job import Job, units

UPDATE_BYTES = 4 * 4 * CHUNK
"""fp32 copies of a chunk of master, gradient and moments, in which the update works."""


class Owned(NamedTuple):
    """Elements in the flat space of a rank, of the root and of a block."""

    root: int
    block: int
    trained_root: int
    trained_block: int


class Parts(NamedTuple):
    """Elements of a unit on one rank: gathered, by the ranks it is cut over."""

    dense: int
    "Cut over all ranks."
    experts: int
    "Cut over the ranks with the same experts; with ep = 1 they are dense too."

    @property
    def numel(self) -> int:
        return self.dense + self.experts


def layout(job: Job) -> Layout:
    """The layout of the rank that owns most, in which blocks are one and the same."""
    model = job.model
    one = replace(model, num_hidden_layers=1)
    root, block, owned = _units(one, job.adapter, job.compute_bytes, job.ranks, job.ep)
    layers = model.num_hidden_layers
    numel = max(o.root + layers * o.block for o in owned)
    trained = max(o.trained_root + layers * o.trained_block for o in owned)
    return Layout((root, *[block] * layers), numel, trained)


@functools.lru_cache(maxsize=4096)
def _units(
    model: ModelConfig, adapter: AdapterConfig, weight_bytes: int, ranks: int, ep: int
) -> tuple[Unit, Unit, tuple[Owned, ...]]:
    """Root and block of the rank that has most of a block, and what each rank owns of them."""
    root, block = units(model, adapter, weight_bytes)
    named = [("root", root), ("block", block)]
    first = make_layout(named, world=ranks, ep=ep, rank=0)
    of_root, of_block = (_owned(unit.groups, ranks, ep) for unit in first.units)
    most = of_block.index(max(of_block))
    placed = make_layout(named, world=ranks, ep=ep, rank=most).units
    of_trained = (_owned(unit.trained, ranks, ep) for unit in first.units)
    owned = map(Owned, of_root, of_block, *of_trained)
    return placed[0], placed[1], tuple(sorted(set(owned)))


def _owned(groups: Sequence[Group], ranks: int, ep: int) -> list[int]:
    """Elements of groups in the flat space of each rank."""
    owned = [0] * ranks
    for group in groups:
        for rank in range(ranks):
            index = rank if group.axis == "dp" else rank // ep
            owned[rank] += -(-group.flat_numel(index) // ALIGN) * ALIGN
    return owned


def parts(groups: Sequence[Group]) -> Parts:
    """Of a unit's groups, or of those that are trained."""
    dense, experts = (sum(g.numel for g in groups if g.axis == axis) for axis in ("dp", "edp"))
    return Parts(dense, experts)


def page_map(job: Job) -> PageMap:
    """The pages of the rank that owns most."""
    placed = layout(job)
    return PageMap(placed.numel, job.page_bytes, job.format, trained=placed.trained)


def gathered(job: Job) -> int:
    """Bytes of frames of whole weights."""
    return budget.gathered_bytes(layout(job), zero=job.zero, compute_bytes=job.compute_bytes)


def summed(job: Job) -> int:
    """Bytes of gradients on their way."""
    return budget.summed_bytes(
        layout(job),
        zero=job.zero,
        compute_bytes=job.compute_bytes,
        world=job.ranks,
        has_device=job.device == "cuda",
    )


def ssd_bytes(job: Job) -> int:
    """Bytes of the page file."""
    return budget.ssd_bytes(page_map(job))


def fewest_frames(job: Job) -> int:
    """Pages that must be in memory at once when the others are on a disk."""
    return min(page_map(job).num_pages, budget.LEAST_FRAMES)


def angel_waste(job: Job) -> float:
    """Share of memory lost if a page held at most two tensors, as AngelPTM's do, for the matrices
    of one rank in bf16: each expert's are tensors of their own there."""
    page, used, held = job.page_bytes, 0, 0
    both = units(job.model, job.adapter, job.compute_bytes)
    for members, count in zip(both, (1, job.model.num_hidden_layers)):
        tensors: list[int] = []
        for member in (m for m in members if len(m.shape) > 1):
            pieces = 1
            if member.is_expert:
                pieces = member.shape[0] // job.ep * (2 if member.name.endswith("w1") else 1)
            owned = math.prod(member.shape) / job.ranks
            tensors += [math.ceil(owned / pieces) * 2] * pieces
        used += count * sum(tensors)
        held += count * page * _pages_of_two(tensors, page)
    return held / used - 1


def _pages_of_two(tensors: Sequence[int], page_bytes: int) -> int:
    """Pages that tensors take one after another when each page has at most two of them."""
    pages, free, residents = 0, 0, 2
    for size in tensors:
        left = size
        if residents < 2 and free:
            left -= min(left, free)
            residents += 1
        if left:
            more = -(-left // page_bytes)
            pages += more
            free = more * page_bytes - left
            residents = 1
    return pages
