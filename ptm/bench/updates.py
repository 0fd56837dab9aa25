"""`ptm bench updates`: what late weights cost and what they save.

The small model of recipe=router_ablation is trained on equal tokens with updates that are exact,
one step late, and as late as the disk makes them, each with two thirds of its pages in memory and
the rest on a disk; exact in memory stands beside. Said of each: the held-out loss and its distance
from exact, the time of a step, the share of it spent waiting for updates and pages, and how late
weights were. Runs go one after another, so that they do not wait for each other.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ptm.bench.runs import train_run
from ptm.jobs import BenchJob

SHARED = ("recipe=router_ablation", "engine.zero=3", "engine.page_mib=1", "checkpoint.interval=0")
MEMORY = "engine.cpu_bytes=26MiB"
"""Of the 2.17 M parameters' states, gradients and frames, about two thirds."""


class Arm(NamedTuple):
    name: str
    words: tuple[str, ...]


ARMS = (
    Arm("exact, in memory", ()),
    Arm("exact", (MEMORY, "engine.update=exact")),
    Arm("bounded", (MEMORY, "engine.update=bounded")),
    Arm("lock_free", (MEMORY, "engine.update=lock_free")),
)


def run(bench: BenchJob) -> None:
    """Train all arms, or read those that are done, and print the table. Raises PtmError."""
    pairs = [(arm, seed) for seed in range(bench.seeds) for arm in ARMS]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    found = []
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(f"{len(pairs)} runs of {bench.steps} steps", total=len(pairs))
        for arm, seed in pairs:
            found.append(_measure(bench, arm, seed))
            progress.advance(bar)
    result = {"bench": "updates", "steps": bench.steps, "rows": summary(found), "runs": found}
    console = Console()
    console.width = max(console.width, 120)  # a table in a log file is not wrapped
    console.print(table(result))
    if bench.json:
        Path(bench.json).write_text(json.dumps(result, indent=1) + "\n")


def _measure(bench: BenchJob, arm: Arm, seed: int) -> dict[str, Any]:
    name = f"{arm.name.replace(', ', '-').replace(' ', '-')}-seed{seed}-{bench.steps}"
    out = Path(bench.out).resolve()
    pages = out / "pages" / name
    pages.mkdir(parents=True, exist_ok=True)
    words = [*SHARED, *arm.words, f"engine.ssd_path={pages}", f"train.steps={bench.steps}"]
    steps = train_run(out / name, [*words, f"train.seed={seed}"])
    settled = steps[len(steps) // 4 :]  # after warm-up, when late weights may be late
    total_s = sum(step["step_s"] for step in settled)
    updates = [step.get("updates", {}) for step in settled]
    pages_s = sum(step.get("pages", {}).get("waited_s", 0.0) for step in settled)
    return {
        "update": arm.name,
        "seed": seed,
        "loss": steps[-1]["eval_loss"],
        "tokens": steps[-1]["tokens"],
        "step_s": statistics.median(step["step_s"] for step in settled),
        "update_wait": sum(u.get("waited_s", 0.0) for u in updates) / total_s,
        "page_wait": pages_s / total_s,
        "reads": statistics.mean(step.get("pages", {}).get("reads", 0) for step in settled),
        "late_mean": updates[-1].get("late_steps_mean"),
        "late_most": updates[-1].get("late_steps_most"),
        "merged": sum(u.get("merged", 0) for u in updates),
    }


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and the gap in loss to exact at equal seeds, in per cent."""
    exact = {run["seed"]: run["loss"] for run in found if run["update"] == "exact"}
    rows = []
    for arm in ARMS:
        runs = [run for run in found if run["update"] == arm.name]
        gaps = [100 * (run["loss"] / exact[run["seed"]] - 1) for run in runs]
        row: dict[str, Any] = {"update": arm.name, "gap_percent": statistics.mean(gaps)}
        row["gap_most"] = max(gaps, key=abs)
        for key in ("loss", "step_s", "update_wait", "page_wait", "reads", "merged"):
            row[key] = statistics.mean(run[key] for run in runs)
        for key in ("late_mean", "late_most"):
            row[key] = runs[-1][key]
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> Table:
    tokens = result["runs"][0]["tokens"]
    shown = Table(title=f"updates after {tokens:,} tokens: mean over seeds")
    heads = "update|held-out loss|to exact|step s|waits: updates|pages|pages read|late|merged"
    for head in heads.split("|"):
        shown.add_column(head, justify="left" if head == "update" else "right")
    for row in result["rows"]:
        late = row["late_mean"]
        shown.add_row(
            row["update"],
            f"{row['loss']:.4f}",
            f"{row['gap_percent']:+.2f} %",
            f"{row['step_s']:.3f}",
            f"{row['update_wait']:.1%}",
            f"{row['page_wait']:.1%}",
            f"{row['reads']:.0f}",
            "" if late is None else f"{late:.2f}, most {row['late_most']:.0f}",
            f"{row['merged']:.0f}",
        )
    return shown
