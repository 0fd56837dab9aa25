"""`ptm bench tiers`: the paged engine with its states in memory, in memory and on a disk, and on
the accelerator where there is one, in turns; beside a raw probe of the disk in pages of that size.

The disk row keeps `engine.cpu_bytes` of the recipe in memory, or 60 % of the states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ptm.bench import show
from ptm.bench.interleave import Contestant, run_bench
from ptm.engine.tier import probe
from ptm.jobs import StepBenchJob
from ptm.model.config import num_parameters

BASE = "RAM"
PROBE_S = 4.0
STATE_BYTES = 16
"A parameter's weight, master, moments and gradient sum."


def contestants(bench: StepBenchJob, words: tuple[str, ...], disk: Path) -> list[Contestant]:
    states = STATE_BYTES * num_parameters(bench.model) // bench.ranks
    cpu = bench.engine.cpu_bytes or f"{int(0.6 * states / show.MIB)}MiB"
    plain = tuple(w for w in words if not w.startswith(("engine.cpu_bytes=", "engine.ssd_")))
    shared = ("engine.zero=3", *plain, "engine.kind=paged")
    on_disk = (*shared, f"engine.cpu_bytes={cpu}", f"engine.ssd_path={disk}")
    rows = [Contestant(BASE, shared), Contestant("RAM+SSD", on_disk)]
    if torch.cuda.is_available():
        in_ram = (*shared, "engine.gpu_bytes=0B")
        rows = [Contestant("GPU", shared), Contestant(BASE, in_ram), rows[1]]
    return rows


def run(bench: StepBenchJob, words: tuple[str, ...]) -> None:
    out = Path(bench.out)
    disk = Path(bench.engine.ssd_path) if bench.engine.ssd_path else out / "pages"
    disk.mkdir(parents=True, exist_ok=True)
    before = probe(disk, bench.engine.page_bytes, PROBE_S)
    results = run_bench(bench, contestants(bench, words, disk.resolve()))
    after = probe(disk, bench.engine.page_bytes, PROBE_S)
    found: dict[str, Any] = {"bench": "tiers", "ranks": bench.ranks, "words": list(words)}
    found["probe"] = {"before": before._asdict(), "after": after._asdict()}
    base = show.base_of(results, BASE)
    found["rows"] = show.summary(results, base)
    caption = "; ".join(
        [f"disk probe {_rates(before)} before, {_rates(after)} after", *map(_moved, found["rows"])]
    )
    title = f"tiers, {bench.ranks} ranks, {bench.rounds} rounds of {bench.round_steps} steps"
    show.report(
        show.table(found["rows"], base=base, title=title, caption=caption), found, bench.json
    )


def _rates(probed: Any) -> str:
    read, write = probed.read_bytes_per_s / show.MIB, probed.write_bytes_per_s / show.MIB
    return f"{read:,.0f} MiB/s read, {write:,.0f} written"


def _moved(row: dict[str, Any]) -> str:
    """What a row's pages moved, over all ranks, by the clock of the whole round."""
    if "error" in row or not row["rounds"]:
        return f"{row['name']}: nothing"
    last = row["rounds"][-1]
    moved = (last["report"].get(f"pages_{way}_bytes", 0.0) for way in ("read", "write"))
    read, written = (value / last["seconds"] / show.MIB for value in moved)
    return f"{row['name']}: {read:,.0f} MiB/s read, {written:,.0f} written over the round"
