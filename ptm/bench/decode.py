"""`ptm bench decode`: how fast a model generates in bf16 and from each of its exports, in turns.

Every contestant continues the same prompts with the same number of greedy tokens; a turn is one
batch of prompts on some threads. Given are tokens a second, best and median of the turns, and the
ratio to bf16 within a turn, median (least to most).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ptm.bench import show
from ptm.checkpoint.load_model import module_of, quantized_module_of
from ptm.checkpoint.open_model import open_model
from ptm.common.errors import as_typed
from ptm.common.units import format_bytes
from ptm.export.verify import size_of
from ptm.jobs import DecodeBenchJob
from ptm.model.transformer import Transformer

PROMPT = 16
"Tokens of each prompt."


def run(job: DecodeBenchJob) -> None:
    with as_typed({"folder": "run"}):
        reference = open_model(Path(job.run))
    with as_typed({"folder": "exports", "run": "exports"}):
        exports = {Path(folder).name: open_model(Path(folder)) for folder in job.exports}
    models = {"bf16": module_of(reference, job.run, dtype=torch.bfloat16)}
    models |= {name: quantized_module_of(one, one.folder) for name, one in exports.items()}
    sizes = {"bf16": size_of(reference)} | {name: size_of(one) for name, one in exports.items()}
    cases = [(threads, batch) for threads in job.threads for batch in job.batches]
    before, rows = torch.get_num_threads(), []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("generating", total=len(cases) * job.rounds * len(models))
        for threads, batch in cases:
            torch.set_num_threads(threads)
            turns: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(job.rounds + 1):
                for name, model in models.items():
                    rate = _rate(model, batch, job.tokens)
                    if turn:  # the first warms up
                        turns[name].append(rate)
                        progress.advance(task)
            rows += [_row(name, turns, sizes, threads, batch) for name in models]
    torch.set_num_threads(before)
    found = {"bench": "decode", "run": job.run, "rows": rows}
    show.report(_table(rows, job), found, job.json)


@torch.no_grad()
def _rate(model: Transformer, batch: int, count: int) -> float:
    """Tokens a second over all rows, the prompt's forward included."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), generator=g)
    began = time.perf_counter()
    for _ in model.stream(ids, count):
        pass
    return batch * count / (time.perf_counter() - began)


def _row(
    name: str, turns: dict[str, list[float]], sizes: dict[str, int], threads: int, batch: int
) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(turns[name], turns["bf16"])]
    return {
        "name": name,
        "threads": threads,
        "batch": batch,
        "best": max(turns[name]),
        "median": statistics.median(turns[name]),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "size_bytes": sizes[name],
    }


def _table(rows: list[dict[str, Any]], job: DecodeBenchJob) -> Table:
    shown = Table(title=f"greedy tokens/s, {job.tokens} tokens a row, {job.rounds} rounds")
    for head in ["threads", "batch", "model", "size", "best", "median", "to bf16"]:
        shown.add_column(head, justify="left" if head == "model" else "right")
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({row['least']:.2f}-{row['most']:.2f})"
        size = format_bytes(row["size_bytes"])
        rates = (f"{row['best']:,.0f}", f"{row['median']:,.0f}")
        shown.add_row(str(row["threads"]), str(row["batch"]), row["name"], size, *rates, ratio)
    return shown
