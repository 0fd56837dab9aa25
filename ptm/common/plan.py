"""The plan: what one run needs of each rank, and what is there; made by ptm/planner.

A plan is data. It is printed as one table at the start of a run, stored beside the recipe as
plan.txt, and shown in the report, so it holds no more than what it shows and imports nothing
heavier than rich, and that only to draw.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptm.common.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Memory of one kind on one rank."""

    kind: str
    """parameters, gradients, optimizer states, activations or buffers"""
    size_bytes: int
    why: str
    """The formula with its numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of a run and its memory per rank, on a machine."""

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
    needs: tuple[Need, ...]
    machine: str
    there_bytes: int
    """Memory that one rank may use."""
    there_why: str
    checkpoint_bytes: int
    """One checkpoint on disk, over all ranks."""

    @property
    def needed_bytes(self) -> int:
        return sum(need.size_bytes for need in self.needs)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.there_bytes

    def rows(self) -> list[tuple[str, str]]:
        """What is planned, as pairs of words."""
        num_rows = self.batch_tokens // self.seq_len
        rows = f"{num_rows:,} rows of {self.seq_len:,}"
        idle = f"; {self.ranks - num_rows:,} ranks have none" if self.ranks > num_rows else ""
        total, active = self.num_parameters, self.active_parameters
        return [
            ("model", f"scale {self.scale}: {total:,} parameters ({format_count(total)})"),
            ("active per token", f"{active:,} ({format_count(active)})"),
            ("compute", f"{self.flops_per_token / 1e9:,.3f} GFLOP a token, forward and backward"),
            ("step", f"{self.batch_tokens:,} tokens = {rows}"),
            (
                "a rank's share",
                f"{self.micro_batches:,} micro-batches of {self.micro_batch_size:,} rows{idle}",
            ),
            ("precision", f"{self.precision}, recompute {self.recompute}"),
            ("ranks", f"{self.ranks:,} on {self.machine}"),
            ("one checkpoint", f"{format_bytes(self.checkpoint_bytes)} on disk"),
        ]

    def table(self) -> Group:
        """Two tables for a rich console: the run, and its memory per rank."""
        from rich.console import Group
        from rich.table import Table

        run = Table(show_header=False, box=None, pad_edge=False)
        run.add_column(style="bold", no_wrap=True)
        run.add_column()
        for name, text in self.rows():
            run.add_row(name, text)
        memory = Table(title="memory per rank", title_justify="left", pad_edge=False, box=None)
        memory.add_column("kind", no_wrap=True)
        memory.add_column("needed", justify="right", no_wrap=True)
        memory.add_column("because", style="dim")
        for need in self.needs:
            memory.add_row(need.kind, format_bytes(need.size_bytes), need.why)
        memory.add_section()
        verdict = "fits" if self.fits else "does not fit"
        share = (
            f"{self.needed_bytes / self.there_bytes:.0%} of it: {verdict}"
            if self.there_bytes
            else verdict
        )
        memory.add_row("needed", format_bytes(self.needed_bytes), share, style="bold")
        memory.add_row("there", format_bytes(self.there_bytes), self.there_why, style="bold")
        return Group(run, "", memory)

    def text(self, width: int = 110) -> str:
        """The table as plain text, for plan.txt and for errors."""
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=width, no_color=True, legacy_windows=False).print(self.table())
        return "\n".join(text.rstrip() for text in out.getvalue().splitlines()) + "\n"
