"""`ptm bench engines`: paged, FSDP2 with ptm's collectives, FSDP2 as it is, and DeepSpeed ZeRO-3,
on the same model, data, ranks and precision, in turns (ptm/bench/interleave.py).

Ranks exchange rows in memory that they share, so nothing is on the wire, but for `stock`, DeepSpeed
and `paged gloo`.

Engines share the model's code, so expert rows are padded alike. Recipe words apply to all. A peer
that cannot run here shows its error and version; DeepSpeed on a disk needs an op built ahead, whose
folder `ops_dir` names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptm.bench import show
from ptm.bench.interleave import Contestant, chosen, run_bench
from ptm.jobs import StepBenchJob

BASE = "fsdp"


def contestants(words: tuple[str, ...], out: Path, ops_dir: str | None) -> list[Contestant]:
    """The rows of the table. `words` come last, but for the kind."""
    disk = out / "nvme"
    built = {"TORCH_EXTENSIONS_DIR": ops_dir} if ops_dir else {}

    def row(name: str, kind: str, *more: str, **options: bool) -> Contestant:
        variables = built if kind == "deepspeed" else {}
        if name.endswith(" gloo"):
            variables = {"PTM_COLLECTIVES": "gloo"}
        shared = ("engine.zero=3", *words, f"engine.kind={kind}", *more)
        return Contestant(name, shared, options, variables)

    return [
        row("paged", "paged"),
        row("paged gloo", "paged"),
        row(BASE, "fsdp"),
        row("fsdp stock", "fsdp", is_stock=True),
        row("deepspeed", "deepspeed"),
        row("deepspeed nvme", "deepspeed", f"engine.ssd_path={disk}", may_compile=bool(ops_dir)),
    ]


def run(bench: StepBenchJob, words: tuple[str, ...]) -> None:
    out = Path(bench.out)
    (out / "nvme").mkdir(parents=True, exist_ok=True)
    rows = chosen(contestants(words, out, bench.ops_dir), bench.only, BASE)
    results = run_bench(bench, rows)
    found: dict[str, Any] = {"bench": "engines", "ranks": bench.ranks, "words": list(words)}
    base = show.base_of(results, BASE)
    found["rows"] = show.summary(results, base)
    title = f"engines, {bench.ranks} ranks, {bench.rounds} rounds of {bench.round_steps} steps"
    caption = "median of rounds; ratio within a round: median (least-most)"
    show.report(
        show.table(found["rows"], base=base, title=title, caption=caption), found, bench.json
    )
