"""`ptm bench router`: which router learns best, by the experiment of table 1 of arXiv 2405.17976,
small.

Attention, linear (the paper's "classical") and shared-expert routers are trained by `ptm train
recipe=router_ablation` on equal tokens and (but for the router's own weights) equal parameters,
over several seeds, and tested on the same held-out text. A seed sets weights and order of data, so
a comparison at equal seeds is paired. The published numbers stand beside ours; scale and data
differ, so it is the order and the size of the gaps that can be compared.

Runs go through the command line, in processes of one thread, as many at a time as there are cores.
A run that was killed goes on from its last checkpoint, a finished one is read from its folder.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
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

from ptm.bench.runs import steps_done, train_run
from ptm.jobs import BenchJob
from ptm.model.config import num_parameters
from ptm.recipe import load_recipe


class Arm(NamedTuple):
    """One row of the table: a router and the words that make its model the size of the others."""

    name: str
    words: tuple[str, ...]
    published_loss: float
    published_millions: float


SHARED = (
    "model.router=shared_expert",
    "model.num_experts=16",
    "model.num_experts_per_tok=4",
    "model.num_shared_experts=2",
    "model.moe_intermediate_size=128",
)
# The paper's shapes: 8 experts, 2 active; for shared experts 16 of half the size, 2 of them always
# on and 2 of the other 14 chosen.
ARMS = (
    Arm("attention", ("model.router=attention",), 2.109, 826.0),
    Arm("linear", ("model.router=linear",), 2.117, 825.8),
    Arm("shared_expert", SHARED, 2.117, 825.8),
)


def run(bench: BenchJob) -> None:
    """Train, or finish, all runs and print the table. Raises PtmError when a run fails."""
    started = time.time()
    pairs = [(arm, seed) for seed in range(bench.seeds) for arm in ARMS]
    jobs = bench.jobs or len(os.sched_getaffinity(0))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        total = len(pairs) * bench.steps
        bar = progress.add_task(f"{len(pairs)} runs of {bench.steps} steps", total=total)
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(_train, bench, arm, seed) for arm, seed in pairs]
            while not all(f.done() for f in futures):
                done = sum(steps_done(_folder(bench, arm, seed)) for arm, seed in pairs)
                progress.update(bar, completed=done)
                time.sleep(1.0)
        progress.update(bar, completed=total)
    found = [f.result() for f in futures]
    result = summary(found, bench)
    result["took_s"] = round(time.time() - started, 1)
    console = Console()
    console.width = max(console.width, 110)  # a table in a log file is not wrapped
    console.print(table(result))
    if bench.json:
        Path(bench.json).write_text(json.dumps(result, indent=1) + "\n")


def _folder(bench: BenchJob, arm: Arm, seed: int) -> Path:
    return Path(bench.out) / f"{arm.name}-seed{seed}-{bench.steps}"


def _train(bench: BenchJob, arm: Arm, seed: int) -> dict[str, Any]:
    folder = _folder(bench, arm, seed)
    words = ["recipe=router_ablation", *arm.words, f"train.steps={bench.steps}"]
    steps = train_run(folder, [*words, f"train.seed={seed}"])
    model = load_recipe([f"recipe={folder / 'recipe.yaml'}"]).model
    return {
        "router": arm.name,
        "seed": seed,
        "test_loss": steps[-1]["eval_loss"],
        "test_bits_per_byte": steps[-1]["eval_bits_per_byte"],
        "tokens": steps[-1]["tokens"],
        "num_parameters": num_parameters(model),
        "step_s": statistics.median(step["step_s"] for step in steps),
        "busiest": statistics.mean(v["max_over_mean"] for v in steps[-1]["expert_load"].values()),
    }


def summary(found: list[dict[str, Any]], bench: BenchJob) -> dict[str, Any]:
    """Mean and spread by router, and the gap to the attention router at equal seeds."""
    found = sorted(found, key=lambda run: run["seed"])
    by = {arm.name: [run for run in found if run["router"] == arm.name] for arm in ARMS}
    rows = []
    for arm in ARMS:
        losses = [r["test_loss"] for r in by[arm.name]]
        gaps = [r["test_loss"] - a["test_loss"] for r, a in zip(by[arm.name], by["attention"])]
        rows.append(
            {
                "router": arm.name,
                "num_parameters": by[arm.name][0]["num_parameters"],
                "tokens": by[arm.name][0]["tokens"],
                "test_loss": statistics.mean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
                "gap": statistics.mean(gaps),
                "gap_spread": statistics.stdev(gaps) if len(gaps) > 1 else 0.0,
                "losses": losses,
                "step_s": statistics.median(r["step_s"] for r in by[arm.name]),
                "busiest": statistics.mean(r["busiest"] for r in by[arm.name]),
                "published_loss": arm.published_loss,
                "published_gap": arm.published_loss - ARMS[0].published_loss,
            }
        )
    return {
        "bench": "router",
        "steps": bench.steps,
        "seeds": bench.seeds,
        "rows": rows,
        "runs": found,
    }


def table(result: dict[str, Any]) -> Table:
    rows = result["rows"]
    title = f"routers after {rows[0]['tokens']:,} tokens, {result['seeds']} seeds: mean (deviation)"
    caption = "published: table 1 of arXiv 2405.17976, 826 M parameters, 30 B tokens"
    shown = Table(title=title, caption=caption)
    columns = "router|parameters|test loss|gap to attention|step s|busiest/mean|published|its gap"
    for name in columns.split("|"):
        shown.add_column(name, justify="left" if name == "router" else "right")
    for row in rows:
        shown.add_row(
            row["router"],
            f"{row['num_parameters']:,}",
            f"{row['test_loss']:.4f} ({row['spread']:.4f})",
            f"{row['gap']:+.4f} ({row['gap_spread']:.4f})",
            f"{row['step_s']:.3f}",
            f"{row['busiest']:.2f}",
            f"{row['published_loss']:.3f}",
            f"{row['published_gap']:+.3f}",
        )
    return shown
