"""`ptm bench experts`: a layer's experts over ranks, dispatch to combine, forward and backward, by
each way that rows can take, in turns (ptm/bench/interleave.py, layer.py).

    in place   experts read the rows of other ranks in shared memory (ptm/parallel/in_memory.py)
    memory     rows are sent, through shared memory
    gloo       rows are sent, over gloo
    alone      as many rows, all from the rank itself: what computing alone takes

`engine.ep` is all ranks where it is not given. Time is that of the slowest rank, CPU time the mean
of ranks, all threads.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ptm.bench import show
from ptm.bench.interleave import Contestant, Result, Spread, chosen, run_bench
from ptm.jobs import StepBenchJob

BASE = "in place"


def contestants(bench: StepBenchJob, words: tuple[str, ...]) -> list[Contestant]:
    words = (*words, f"engine.ep={bench.engine.ep if bench.engine.ep > 1 else bench.ranks}")

    def row(name: str, transport: str, **options: bool) -> Contestant:
        return Contestant(name, words, options, {"PTM_COLLECTIVES": transport}, peer="experts")

    return [
        row(BASE, "memory"),
        row("memory", "memory", is_sent=True),
        row("gloo", "gloo", is_sent=True),
        row("alone", "memory", is_alone=True),
    ]


def run(bench: StepBenchJob, words: tuple[str, ...]) -> None:
    results = run_bench(bench, chosen(contestants(bench, words), bench.only, BASE))
    found: dict[str, Any] = {"bench": "experts", "ranks": bench.ranks, "words": list(words)}
    found["rows"] = rows(results, bench.ranks)
    show.report(table(found), found, bench.json)


def rows(results: list[Result], ranks: int) -> list[dict[str, Any]]:
    """Of each: seconds and CPU seconds of a call, and as a ratio to the first by rounds."""

    def seconds(one: dict[str, Any]) -> float:
        return one["seconds"] / (one["report"]["calls"] / ranks)

    def cpu_s(one: dict[str, Any]) -> float:
        return one["cpu_s"] / one["report"]["calls"]

    found = []
    for result in results:
        row: dict[str, Any] = {"name": result.name, "version": result.version}
        if result.error is not None:
            row["error"] = result.error
        else:
            for key, value in (("seconds", seconds), ("cpu_s", cpu_s)):
                row[key] = result.spread(value)._asdict()
                row[f"{key}_ratio"] = result.ratio(results[0], value)._asdict()
            row["norm"] = result.rounds[-1]["loss"]
        found.append(row)
    return found


def table(found: dict[str, Any]) -> Table:
    shown = Table(
        title=f"experts of a layer over {found['ranks']} ranks, forward and backward",
        caption="ms a call: median (least); to ours within a round: median (least-most)",
    )
    for head in ("rows", "ms", f"to {BASE}", "CPU ms a rank", f"to {BASE}", "norm of y"):
        shown.add_column(head, justify="left" if head == "rows" else "right")
    for row in found["rows"]:
        if "error" in row:
            shown.add_row(row["name"], "failed")
            continue
        cells = []
        for key in ("seconds", "cpu_s"):
            time, ratio = Spread(**row[key]), Spread(**row[f"{key}_ratio"])
            cells.append(f"{time.median * 1e3:.1f} ({time.least * 1e3:.1f})")
            cells.append(f"{ratio.median:.2f} ({ratio.least:.2f}-{ratio.most:.2f})")
        shown.add_row(row["name"], *cells, f"{row['norm']:.6f}")
    return shown
