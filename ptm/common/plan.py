"""The plan: what one run needs of each rank, and what is there; made by ptm/planner.

A plan is data. It is printed as tables at the start of a run, stored beside the recipe as
plan.txt, and shown in the report, so it holds no more than what it shows and imports nothing
heavier than rich, and that only to draw. The engine takes `zero` and `tier_bytes` from it, which
must be the same on every rank: where ranks plan by themselves, all take rank 0's.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ptm.common.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


class Need(NamedTuple):
    """Memory of one kind on one rank."""

    kind: str
    """pages, weights, gradients, activations, buffers, copy for saving, page file"""
    size_bytes: int
    why: str
    """The formula with its numbers."""
    tier: str
    """gpu, cpu or ssd"""


class Tier(NamedTuple):
    """One tier of one rank: what is needed of it, and what is there."""

    name: str
    needed_bytes: int
    there_bytes: int
    why: str

    @classmethod
    def of(cls, name: str, needs: Iterable[Need], there_bytes: int, why: str) -> Tier:
        return cls(name, sum(need.size_bytes for need in needs), there_bytes, why)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.there_bytes


class Spent(NamedTuple):
    """Seconds of a step of one kind."""

    what: str
    seconds: float
    why: str
    is_hidden: bool
    """Whether it goes on beside computing."""


class Option(NamedTuple):
    """Another way to run the recipe, beside the one that was chosen."""

    words: str
    needed_bytes: int
    step_s: float | None
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of a run, its memory per rank and tier, and the seconds of a step, on a machine."""

    scale: str
    ranks: int
    num_parameters: int
    active_parameters: int
    flops_per_token: float
    """Forward and backward; recomputed work does not count."""
    seq_len: int
    batch_tokens: int
    micro_batch_size: int
    micro_batches: int
    """Micro-batches a rank takes in one step, at most."""
    precision: str
    recompute: str
    zero: int
    """What is sharded: 1 optimizer states, 2 gradients too, 3 weights too."""
    ep: int
    needs: tuple[Need, ...]
    tiers: tuple[Tier, ...]
    """The rank's main memory first."""
    tier_bytes: dict[str, int]
    """Budgets of the engine, as engine.gpu_bytes, cpu_bytes and ssd_bytes count them."""
    page_waste: float
    angel_waste: float
    """What two tensors a page would waste."""
    machine: str
    checkpoint_bytes: int
    """One checkpoint on disk, over all ranks."""
    spent: tuple[Spent, ...] = ()
    """Empty where the machine's speed is not known."""
    step_s: float | None = None
    wire_bytes: float = 0.0
    """Sent by one rank in a step."""
    wire_why: str = ""
    speed_why: str = ""
    options: tuple[Option, ...] = ()

    @property
    def needed_bytes(self) -> int:
        """Of the rank's main memory."""
        return self.tiers[0].needed_bytes

    @property
    def there_bytes(self) -> int:
        return self.tiers[0].there_bytes

    @property
    def fits(self) -> bool:
        return all(tier.fits for tier in self.tiers)

    @property
    def tokens_per_s(self) -> float | None:
        return None if not self.step_s else self.batch_tokens / self.step_s

    def rows(self) -> list[tuple[str, str]]:
        """What is planned, as pairs of words."""
        num_rows = self.batch_tokens // self.seq_len
        rows = f"{num_rows:,} rows of {self.seq_len:,}"
        idle = f"; {self.ranks - num_rows:,} ranks have none" if self.ranks > num_rows else ""
        total, active = self.num_parameters, self.active_parameters
        sharded = {1: "optimizer states", 2: "and gradients", 3: "and weights"}
        over = ", ".join(sharded[stage] for stage in range(1, self.zero + 1))
        angel = ""
        if self.angel_waste < 10:  # more is a model of a few pages
            angel = (
                f"; two tensors a page, as AngelPTM has them, would waste {self.angel_waste:.0%}"
            )
        found = [
            ("model", f"scale {self.scale}: {total:,} parameters ({format_count(total)})"),
            ("active per token", f"{active:,} ({format_count(active)})"),
            ("compute", f"{self.flops_per_token / 1e9:,.3f} GFLOP a token, forward and backward"),
            ("step", f"{self.batch_tokens:,} tokens = {rows}"),
            (
                "a rank's share",
                f"{self.micro_batches:,} micro-batches of {self.micro_batch_size:,} rows{idle}",
            ),
            ("precision", f"{self.precision}, recompute {self.recompute}"),
            ("ranks", f"{self.ranks:,} on {self.machine}, ep {self.ep}"),
            ("zero", f"{self.zero}: {over} sharded"),
            ("pages", f"{self.page_waste:.2%} wasted{angel}"),
            ("sent by a rank", f"{format_bytes(self.wire_bytes)} a step{self.wire_why}"),
            ("one checkpoint", f"{format_bytes(self.checkpoint_bytes)} on disk"),
        ]
        if self.step_s is not None and self.tokens_per_s is not None:
            found.append(
                ("a step takes", f"{_seconds(self.step_s)}, {self.tokens_per_s:,.0f} tokens/s")
            )
        return found

    def table(self) -> Group:
        """Tables for a rich console: the run, its memory per rank, its time, and other ways."""
        from rich.console import Group

        run = _table("", ("", "left"), ("", "left"))
        run.show_header = False
        for name, text in self.rows():
            run.add_row(f"[bold]{name}[/]", text)
        parts = [run, "", self._memory()]
        if self.spent:
            parts += ["", self._time()]
        if self.options:
            parts += ["", self._others()]
        return Group(*parts)

    def _memory(self) -> Table:
        memory = _table(
            "memory per rank", ("tier", ""), ("kind", ""), ("needed", "r"), ("because", "w")
        )
        for tier in self.tiers:
            for need in self.needs:
                if need.tier == tier.name:
                    memory.add_row(tier.name, need.kind, format_bytes(need.size_bytes), need.why)
            share = f"{tier.needed_bytes / tier.there_bytes:.0%} of " if tier.there_bytes else "of "
            there = f"{share}{format_bytes(tier.there_bytes)} ({tier.why})"
            verdict = "fits" if tier.fits else "does not fit"
            memory.add_row(
                tier.name,
                "needed",
                format_bytes(tier.needed_bytes),
                f"{there}: {verdict}",
                style="bold",
                end_section=True,
            )
        return memory

    def _time(self) -> Table:
        time = _table("time of a step", ("kind", ""), ("seconds", "r"), ("because", "w"))
        for spent in self.spent:
            beside = "beside computing: " if spent.is_hidden else ""
            time.add_row(spent.what, _seconds(spent.seconds), f"{beside}{spent.why}")
        assert self.step_s is not None
        time.add_section()
        time.add_row("step", _seconds(self.step_s), self.speed_why, style="bold")
        return time

    def _others(self) -> Table:
        others = _table(
            "other ways", ("change", "w"), ("needed", "r"), ("step", "r"), ("verdict", "w")
        )
        for option in self.options:
            step = "" if option.step_s is None else _seconds(option.step_s)
            others.add_row(option.words, format_bytes(option.needed_bytes), step, option.verdict)
        return others

    def text(self, width: int = 110) -> str:
        """The tables as plain text, for plan.txt and for errors."""
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=width, no_color=True, legacy_windows=False).print(self.table())
        return "\n".join(text.rstrip() for text in out.getvalue().splitlines()) + "\n"


def _table(title: str, *columns: tuple[str, str]) -> Table:
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", pad_edge=False, box=None)
    for name, kind in columns:
        justify = "right" if kind == "r" else "left"
        table.add_column(name, justify=justify, no_wrap=kind != "w" and kind != "left")
    return table


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
