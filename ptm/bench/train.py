"""`ptm bench train`: a whole step of ptm against what others would train the same shape with
(ptm/bench/peers.py), on the same ranks, tokens and precision, in turns; and where ptm's step goes.

Peers need transformers, and one also deepspeed; a peer that cannot run says so and the others go
on. The shares are of one more step of rank 0 under torch's profiler: seconds of one thread, by op.
What no op has is Python, the updates (kernels that are called without an op), and waiting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ptm.bench import show
from ptm.bench.interleave import Contestant, chosen, run_bench
from ptm.bench.peers import PEERS
from ptm.jobs import StepBenchJob

BASE = "ptm"
LINES = 14


def contestants(words: tuple[str, ...]) -> list[Contestant]:
    """ptm first. The peers' engines take zero=3 where they know it, as FSDP2 does by itself."""
    ours = Contestant(BASE, words, {"is_profiled": True})
    fsdp = ("engine.kind=fsdp", "engine.zero=3")
    peers = [Contestant(name, (*words, *fsdp), peer=name) for name in PEERS]
    return [ours, *peers]


def run(bench: StepBenchJob, words: tuple[str, ...]) -> None:
    out = Path(bench.out)
    results = run_bench(bench, chosen(contestants(words), bench.only, BASE))
    found: dict[str, Any] = {"bench": "train", "ranks": bench.ranks, "words": list(words)}
    base = show.base_of(results, BASE)
    found["rows"] = show.summary(results, base)
    title = f"training, {bench.ranks} ranks, {bench.rounds} rounds of {bench.round_steps} steps"
    caption = "median of rounds; ratio within a round: median (least-most)"
    profile = next(out.glob(f"*-{BASE}/profile.json"), None)
    if profile is not None:
        found["profile"] = json.loads(profile.read_text())
    show.report(
        show.table(found["rows"], base=base, title=title, caption=caption), found, bench.json
    )
    if profile is not None:
        Console(width=120).print(shares(found["profile"]))


def shares(profile: dict[str, Any]) -> Table:
    """The largest parts of a step, and the rest."""
    whole, ops = profile["seconds"], profile["ops"]
    shown = Table(title=f"one step of ptm, rank 0, {whole:.2f} s under the profiler")
    for head in ("what", "s", "share"):
        shown.add_column(head, justify="left" if head == "what" else "right")
    largest = sorted(ops.items(), key=lambda one: -one[1])[:LINES]
    named = sum(ops.values())
    rest = [
        ("other ops", named - sum(seconds for _, seconds in largest)),
        ("no op: Python, updates, waiting", whole - named),
        ("of it waiting for ranks", profile["waited_s"]),
    ]
    for what, seconds in (*largest, *rest):
        shown.add_row(what, f"{seconds:.3f}", f"{100 * seconds / whole:.1f} %")
    return shown
