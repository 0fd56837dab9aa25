"""`ptm bench wire`: bytes of a step counted by the loopback device, by ptm's ledger, and the least.

Rows go over gloo here, whatever PTM_COLLECTIVES says. The device counts packet
heads too (about 0.1 %) and everything in its network: in a namespace of its own (root) only the
ranks. The ledger counts what ptm's collectives send; DeepSpeed's own are not in it. The least is
what any engine must send for `engine.zero` (contestant.elements), without the rows that go to
experts elsewhere.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ptm.bench import show
from ptm.bench.interleave import Contestant, Result, can_isolate, run_bench
from ptm.jobs import StepBenchJob


def run(bench: StepBenchJob, words: tuple[str, ...]) -> None:
    shared = ("engine.zero=3", *words)
    name = str(bench.engine.kind)
    (result,) = run_bench(bench, [Contestant(name, shared, variables={"PTM_COLLECTIVES": "gloo"})])
    found: dict[str, Any] = {"bench": "wire", "ranks": bench.ranks, "words": list(words)}
    found["is_isolated"] = can_isolate()
    found["rows"] = [wire_row(result)]
    show.report(_table(found), found, bench.json)


def wire_row(result: Result) -> dict[str, Any]:
    """Medians over rounds of bytes a step over all ranks, and their ratios."""
    row: dict[str, Any] = {"name": result.name, "version": result.version}
    if result.error is not None:
        return {**row, "error": result.error}

    def per_step(key: str) -> float:
        return result.spread(lambda one: one[key] / one["steps"]).median

    row |= {key: per_step(f"{key}_bytes") for key in ("wire", "ledger", "bound", "least")}
    row["wire_over_ledger"] = row["wire"] / row["ledger"] if row["ledger"] else None
    row["ledger_over_bound"] = row["ledger"] / row["bound"] if row["bound"] else None
    row["wire_over_least"] = row["wire"] / row["least"] if row["least"] else None
    row["rounds"] = result.rounds
    return row


def _table(found: dict[str, Any]) -> Table:
    where = "in a network of their own" if found["is_isolated"] else "loopback shared with others"
    shown = Table(title=f"bytes a step over {found['ranks']} ranks ({where})")
    heads = "engine|device MiB|ledger MiB|least MiB|device/ledger|ledger/its bound|device/least"
    for head in heads.split("|"):
        shown.add_column(head, justify="left" if head == "engine" else "right")
    for row in found["rows"]:
        if "error" in row:
            shown.add_row(row["name"], "failed")
            continue
        sizes = (f"{row[key] / show.MIB:,.2f}" for key in ("wire", "ledger", "least"))
        ratios = (row[key] for key in ("wire_over_ledger", "ledger_over_bound", "wire_over_least"))
        shown.add_row(row["name"], *sizes, *("-" if r is None else f"{r:.4f}" for r in ratios))
    return shown
