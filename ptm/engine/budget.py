"""How many bytes of each tier a rank's states take, and whether the budgets hold them.

    cpu   frames of gathered weights + buffers of gradients + frames of pages
    ssd   two places for every page of weights and states, one for gradients

Everything is known from shapes before anything is allocated, so a budget that is too small is
refused at once, with the table of who needs what. The planner prints the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptm.common.errors import PlanError, line
from ptm.common.units import MIB, format_bytes, parse_bytes
from ptm.engine.config import EngineConfig
from ptm.engine.layout import Group, Layout, PageMap, Unit

LEAST_FRAMES = 8
"""Pages that the update, a gather and the landing of gradients hold at once, and some to move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes of one rank."""

    page_bytes: int
    num_pages: int
    num_frames: int
    "Pages in memory at once."
    gathered_bytes: int
    summed_bytes: int
    ssd_bytes: int

    @property
    def cpu_bytes(self) -> int:
        return self.gathered_bytes + self.summed_bytes + self.num_frames * self.page_bytes

    def table(self) -> str:
        """One line a tier and what fills it."""
        pages = f"{self.num_frames} of {self.num_pages} pages of {format_bytes(self.page_bytes)}"
        rows = [
            ("cpu", "gathered weights", self.gathered_bytes, ""),
            ("cpu", "gradients under way", self.summed_bytes, ""),
            ("cpu", "pages in memory", self.num_frames * self.page_bytes, pages),
            (
                "ssd",
                "page file",
                self.ssd_bytes,
                "two versions of each page" * bool(self.ssd_bytes),
            ),
        ]
        return "\n".join(
            f"{tier:4} {what:20} {format_bytes(size):>12}  {why}".rstrip()
            for tier, what, size, why in rows
        )


def gathered_bytes(layout: Layout, *, zero: int, compute_bytes: int) -> int:
    """Frames of gathered weights: all units below zero 3; else the root and two of the largest."""
    root, *blocks = (unit.numel for unit in layout.units)
    if zero < 3:
        return (root + sum(blocks)) * compute_bytes
    return (root + min(2, len(blocks)) * max(blocks, default=0)) * compute_bytes


def summed_bytes(layout: Layout, *, zero: int, compute_bytes: int, world: int) -> int:
    """Buffers of gradients on their way; ptm/engine/grads.py says which."""
    root, *blocks = (unit.numel for unit in layout.units)
    received = max(sum(received_numel(g) for g in unit.groups) for unit in layout.units)
    if zero == 1 and world > 1:
        return (root + sum(blocks) + received) * 4
    if world == 1:
        return (root + max(blocks, default=0)) * compute_bytes
    depth = min(2, len(blocks))
    return (root + depth * max(blocks, default=0) + (depth + 1) * received) * compute_bytes


def received_numel(group: Group) -> int:
    """Elements that come to this rank when a group is summed; one rank's own stay in place."""
    parts = len(group.cuts) - 1
    return parts * group.shard_numel if parts > 1 else 0


def owned_numel(unit: Unit) -> int:
    return sum(group.shard_numel for group in unit.groups)


def ssd_bytes(pages: PageMap) -> int:
    """The page file: two places for what a commit keeps, one for gradients."""
    return (2 * len(pages.durable) + pages.grads.num_pages) * pages.page_bytes


def make_budget(
    config: EngineConfig,
    layout: Layout,
    pages: PageMap,
    *,
    zero: int,
    compute_bytes: int,
    world: int,
) -> Budget:
    """Share out the recipe's budgets. Raises PlanError with the table where they are too small."""
    gathered = gathered_bytes(layout, zero=zero, compute_bytes=compute_bytes)
    summed = summed_bytes(layout, zero=zero, compute_bytes=compute_bytes, world=world)
    frames = pages.num_pages
    if config.cpu_bytes is not None:
        there = parse_bytes(config.cpu_bytes, key="engine.cpu_bytes")
        frames = min(frames, (there - gathered - summed) // pages.page_bytes)
    on_disk = ssd_bytes(pages) if config.ssd_path is not None else 0
    budget = Budget(
        page_bytes=pages.page_bytes,
        num_pages=pages.num_pages,
        num_frames=frames,
        gathered_bytes=gathered,
        summed_bytes=summed,
        ssd_bytes=on_disk,
    )
    least = min(pages.num_pages, LEAST_FRAMES)
    wanted = pages.num_pages if config.ssd_path is None else least
    if frames < wanted:
        needed = -(-(gathered + summed + wanted * pages.page_bytes) // MIB)
        holds = "all pages" if config.ssd_path is None else f"{least} pages"
        rule = f"must be {needed}MiB or more: largest units, gradients under way, {holds}"
        remedy = "raise it" + ("" if zero == 3 else ", or set engine.zero=3")
        remedy += "" if config.ssd_path else ", or name an engine.ssd_path"
        shown = line("engine.cpu_bytes", config.cpu_bytes, rule, remedy)
        raise PlanError(f"{shown}\n{budget.table()}")
    if config.ssd_bytes is not None:
        there = parse_bytes(config.ssd_bytes, key="engine.ssd_bytes")
        if on_disk > there:
            rule = f"must be {-(-on_disk // MIB)}MiB or more"
            shown = line("engine.ssd_bytes", config.ssd_bytes, rule, "raise it, or use more ranks")
            raise PlanError(f"{shown}\n{budget.table()}")
    return budget
