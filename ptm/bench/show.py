"""The tables of benches that run engines in turns, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ptm.bench.interleave import Result, Spread
from ptm.common.errors import StorageError, line

MIB = 2**20
Value = Callable[[dict[str, Any]], float]


def tokens_per_s(one: dict[str, Any]) -> float:
    return one["tokens"] / one["seconds"]


def step_s(one: dict[str, Any]) -> float:
    return one["seconds"] / one["steps"]


def cpu_per_step(one: dict[str, Any]) -> float:
    return one["cpu_s"] / one["steps"]


def peak(one: dict[str, Any]) -> float:
    return one["peak_bytes"]


def wire(one: dict[str, Any]) -> float:
    return one["wire_bytes"] / one["least_bytes"] if one["least_bytes"] else float("nan")


VALUES: dict[str, Value] = {
    "tokens_per_s": tokens_per_s,
    "step_s": step_s,
    "cpu_s_per_step": cpu_per_step,
    "peak_bytes": peak,
    "wire_over_bound": wire,
}


def base_of(results: Sequence[Result], wanted: str) -> str:
    """What ratios are to: `wanted`, or the first that ran where it could not."""
    ran = [result.name for result in results if result.error is None]
    return wanted if wanted in ran or not ran else ran[0]


def summary(results: Sequence[Result], base: str) -> list[dict[str, Any]]:
    """Of each value: median, least and most over rounds, and as a ratio to `base` by rounds."""
    basis = next(r for r in results if r.name == base)
    rows = []
    for result in results:
        row: dict[str, Any] = {"name": result.name, "version": result.version}
        if result.error is not None:
            row["error"] = result.error
        else:
            row["values"] = {k: result.spread(v)._asdict() for k, v in VALUES.items()}
            row["ratios"] = {k: result.ratio(basis, v)._asdict() for k, v in VALUES.items()}
            row["loss"] = result.rounds[-1]["loss"] if result.rounds else None
            row["rounds"] = result.rounds
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]], *, base: str, title: str, caption: str) -> Table:
    shown = Table(title=title, caption=caption)
    heads = (
        f"engine|tokens/s|to {base}|CPU s/step|to {base}|peak MiB|to {base}|wire/bound|last loss"
    )
    for head in heads.split("|"):
        shown.add_column(head, justify="left" if head == "engine" else "right")
    for row in rows:
        if "error" in row:
            shown.add_row(row["name"], "failed")
            continue
        v = {k: Spread(**s) for k, s in row["values"].items()}
        r = {k: Spread(**s) for k, s in row["ratios"].items()}
        shown.add_row(
            row["name"],
            f"{v['tokens_per_s'].median:,.0f}",
            _ratio(r["tokens_per_s"]),
            f"{v['cpu_s_per_step'].median:.2f}",
            _ratio(r["cpu_s_per_step"]),
            f"{v['peak_bytes'].median / MIB:,.0f}",
            _ratio(r["peak_bytes"]),
            f"{v['wire_over_bound'].median:.3f}",
            f"{row['loss']:.4f}",
        )
    return shown


def report(shown: Table, found: dict[str, Any], path: str | None) -> None:
    """Print the table and the errors below it; write the numbers."""
    console = Console()
    console.width = max(console.width, 120)  # a table in a log file is not wrapped
    console.print(shown)
    for row in found["rows"]:
        if "error" in row:
            console.print(f"{row['name']} ({row['version']}): {row['error']}", markup=False)
    if path:
        try:
            Path(path).write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            rule = f"cannot be written ({error.strerror})"
            raise StorageError(line("json", path, rule, "name another file")) from error


def _ratio(s: Spread) -> str:
    return f"{s.median:.2f} ({s.least:.2f}-{s.most:.2f})"
