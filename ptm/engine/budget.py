"""How many bytes of each tier a rank's states take, and whether the budgets hold them.

    cpu   frames of gathered weights + buffers of gradients + frames of pages
    ssd   two places for every page of weights and states, one for gradients

With an accelerator, weights and gradients are in its memory beside a prefix of the pages, which is
what engine.gpu_bytes counts; the host keeps what is on its way, and the other pages:

    gpu   frames of gathered weights + buffers of gradients + pages of the prefix
    cpu   page-locked room for gradients and commits + frames of pages

Everything is known from shapes before anything is allocated, so a budget that is too small is
refused at once, with the table of who needs what. The planner prints the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptm.common.errors import PlanError, line
from ptm.common.units import MIB, format_bytes, parse_bytes
from ptm.engine.config import EngineConfig
from ptm.engine.device import num_staged
from ptm.engine.layout import Group, Layout, PageMap, Resident, Unit

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
    has_device: bool = False
    resident: Resident = Resident()
    "Pages in device memory."
    moving_bytes: int = 0
    "Page-locked memory of the host for what comes from the device."

    @property
    def num_host_pages(self) -> int:
        return self.num_pages - sum(self.resident)

    @property
    def is_paged(self) -> bool:
        """Whether not all pages of the host are in memory at once."""
        return self.num_frames < self.num_host_pages

    @property
    def beside_bytes(self) -> int:
        """Of the host, beside pages."""
        computing = 0 if self.has_device else self.gathered_bytes + self.summed_bytes
        return computing + self.moving_bytes

    @property
    def cpu_bytes(self) -> int:
        return self.beside_bytes + self.num_frames * self.page_bytes

    @property
    def gpu_bytes(self) -> int:
        """Of the device, with what engine.gpu_bytes does not count; 0 without one."""
        pages = sum(self.resident) * self.page_bytes
        return self.has_device * (self.gathered_bytes + self.summed_bytes + pages)

    def table(self) -> str:
        """One line a tier and what fills it."""
        size, near = format_bytes(self.page_bytes), sum(self.resident)
        pages = f"{self.num_frames} of {self.num_pages} pages of {size}"
        device = [
            ("gpu", "pages of the prefix", near * self.page_bytes, f"{near} pages"),
            ("cpu", "on its way", self.moving_bytes, "page-locked"),
        ]
        main = "gpu" if self.has_device else "cpu"
        rows = [
            (main, "gathered weights", self.gathered_bytes, ""),
            (main, "gradients under way", self.summed_bytes, ""),
            *(device if self.has_device else []),
            ("cpu", "pages in memory", self.num_frames * self.page_bytes, pages),
            (
                "ssd",
                "page file",
                self.ssd_bytes,
                "two versions of each page that changes" * bool(self.ssd_bytes),
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


def summed_bytes(
    layout: Layout, *, zero: int, compute_bytes: int, world: int, has_device: bool = False
) -> int:
    """Buffers of gradients on their way; ptm/engine/grads.py says which."""
    root, *blocks = (unit.trained_numel for unit in layout.units)
    received = max(sum(received_numel(g) for g in unit.trained) for unit in layout.units)
    # A device adds up what came before that is moved, and fills a second buffer meanwhile.
    sums = 4 * max(owned_numel(unit) for unit in layout.units) if has_device and world > 1 else 0
    if zero == 1 and world > 1:
        return (root + sum(blocks) + received) * 4 + sums
    depth = min(2 if world > 1 or has_device else 1, len(blocks))
    numel = root + depth * max(blocks, default=0)
    return (numel + (world > 1) * (depth + 1) * received) * compute_bytes + sums


def received_numel(group: Group) -> int:
    """Elements that come to this rank when a group is summed; one rank's own stay in place."""
    parts = len(group.cuts) - 1
    return parts * group.shard_numel if parts > 1 else 0


def owned_numel(unit: Unit) -> int:
    return sum(group.shard_numel for group in unit.trained)


def ssd_bytes(pages: PageMap) -> int:
    """The page file: two places for what a commit keeps and steps change, one for the rest."""
    return (pages.num_pages + len(pages.durable) - len(pages.frozen)) * pages.page_bytes


def make_budget(
    config: EngineConfig,
    layout: Layout,
    pages: PageMap,
    *,
    zero: int,
    compute_bytes: int,
    world: int,
    gpu_bytes: int | None = None,
) -> Budget:
    """Share out the recipe's budgets. Raises PlanError with the table where they are too small.

    gpu_bytes: of the device for pages; None without a device.
    """
    has_device = gpu_bytes is not None
    gathered = gathered_bytes(layout, zero=zero, compute_bytes=compute_bytes)
    summed = summed_bytes(
        layout, zero=zero, compute_bytes=compute_bytes, world=world, has_device=has_device
    )
    resident, moving = Resident(), 0
    if gpu_bytes is not None:
        resident = pages.resident(gpu_bytes // pages.page_bytes)
        owned = max(owned_numel(unit) for unit in layout.units)
        moving = 2 * owned * (4 if world > 1 else compute_bytes)
        if config.ssd_path is not None:
            moving += num_staged(resident) * pages.page_bytes
    on_disk = ssd_bytes(pages) if config.ssd_path is not None else 0
    frames = pages.num_pages - sum(resident)
    beside = moving if has_device else gathered + summed
    if config.cpu_bytes is not None:
        there = parse_bytes(config.cpu_bytes, key="engine.cpu_bytes")
        frames = min(frames, (there - beside) // pages.page_bytes)
    budget = Budget(
        page_bytes=pages.page_bytes,
        num_pages=pages.num_pages,
        num_frames=frames,
        gathered_bytes=gathered,
        summed_bytes=summed,
        ssd_bytes=on_disk,
        has_device=has_device,
        resident=resident,
        moving_bytes=moving,
    )
    least = min(budget.num_host_pages, LEAST_FRAMES)
    wanted = budget.num_host_pages if config.ssd_path is None else least
    if frames < wanted:
        needed = -(-(beside + wanted * pages.page_bytes) // MIB)
        holds = "all pages" if config.ssd_path is None else f"{least} pages"
        what = "gradients under way" if has_device else "largest units, gradients under way"
        rule = f"must be {needed}MiB or more: {what}, {holds}"
        remedy = "raise it" + ("" if zero == 3 or has_device else ", or set engine.zero=3")
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
