"""`ptm bench gptq`: our GPTQ beside llm-compressor's and GPTQModel's, on one model and one text.

    workload (ptm/bench/gptq_workload.py)  ->  one process a tool, one thread, one after another
        (ptm/bench/gptq_child.py)  ->  all folders measured by the same code (gptq_measure.py)

int4, symmetric, groups of 128. A peer runs in the first of the given interpreters that has it, as
their requirements exclude one another's; where none has it, the table says what installs it. Peers
that have run with the same settings are read from `out` and said to be kept; ptm, whose code
changes, is run again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ptm.bench import gptq_child, show
from ptm.bench.gptq_measure import Reference
from ptm.bench.gptq_workload import Size, write_workload
from ptm.common import env
from ptm.common.errors import RecipeError, line
from ptm.jobs import GptqBenchJob

OURS = "ptm"


class Contestant(NamedTuple):
    """A tool with its settings; `tool` is also the name of its package."""

    name: str
    tool: str
    settings: dict[str, Any]


CONTESTANTS = (
    Contestant("nearest", "ptm", {"method": "nearest"}),
    Contestant(OURS, "ptm", {}),
    Contestant("ptm, alpha=0.25", "ptm", {"alpha": 0.25}),
    Contestant("ptm, alpha=0.5", "ptm", {"alpha": 0.5}),
    Contestant("llm-compressor", "llmcompressor", {}),
    Contestant("llm-compressor, mse", "llmcompressor", {"observer": "mse"}),
    Contestant("GPTQModel", "gptqmodel", {}),
)


def run(job: GptqBenchJob) -> None:
    """Raises RecipeError for an interpreter that does not start."""
    out = Path(job.out)
    workload = out / f"workload-{job.rows}"
    for python in job.python:
        if not _ends_well(python, ""):
            rule = "is no Python of 3.11 or later"
            raise RecipeError(line("python", python, rule, "name an interpreter"))
    homes = {one.tool: _home(one.tool, job.python) for one in CONTESTANTS}
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("making the workload", total=len(CONTESTANTS) + 1)
        if not workload.exists():
            write_workload(workload, Size(rows=job.rows))
        for one in CONTESTANTS:
            progress.update(task, description=one.name)
            rows.append(_quantize(one, homes[one.tool], workload, job))
            progress.advance(task)
        progress.update(task, description="measuring")
        reference = Reference(workload)
        for row in rows:
            if "error" not in row:
                row |= reference.measure(Path(row["folder"]))._asdict()
    found = {"bench": "gptq", "calibration_rows": job.rows, "rows": rows}
    show.report(_table(rows, job.rows), found, job.json)


def _home(tool: str, pythons: tuple[str, ...]) -> str | None:
    """The interpreter to run a tool in: ours, or the first of the others that has it."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({tool!r}) is None)"
    for python in (sys.executable, *pythons):
        if _ends_well(python, code):
            return python
    return None


def _ends_well(python: str, code: str) -> bool:
    try:
        return not subprocess.run([python, "-P", "-c", code], capture_output=True).returncode
    except OSError as error:
        rule = f"does not start ({error.strerror})"
        raise RecipeError(line("python", python, rule, "name an interpreter")) from error


def _quantize(
    one: Contestant, python: str | None, workload: Path, job: GptqBenchJob
) -> dict[str, Any]:
    """A row of the table, without its errors of outputs."""
    if python is None:
        told = f"is not installed; pip install {one.tool} in an environment, python=[its python]"
        return {"name": one.name, "version": "", "error": told}
    settings = dict(one.settings)
    if job.dtype is not None and one.tool != OURS:
        settings["dtype"] = str(job.dtype)
    slug = "-".join([one.name.replace(", ", "-"), *map(str, settings.values()), str(job.rows)])
    out = Path(job.out) / slug
    told = out.with_name(f"{slug}.json")
    if one.tool == OURS:
        shutil.rmtree(out, ignore_errors=True)
        told.unlink(missing_ok=True)
    is_kept = told.exists()
    if not is_kept:
        words = [str(workload), str(out), json.dumps(settings)]
        with open(out.with_name(f"{slug}.log"), "w") as log:
            variables = {"OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
            command = [python, "-P", gptq_child.__file__, one.tool, *words]
            subprocess.run(command, stdout=log, stderr=log, env=env.child(**variables))
    if not told.exists():
        return {"name": one.name, "version": "", "error": f"ended without a word: {slug}.log"}
    row = {"name": one.name, "folder": str(out), **json.loads(told.read_text())}
    if "error" in row:
        told.unlink()  # so that it is tried again
    elif is_kept:
        row["version"] += ", kept"
    return row


def _table(rows: list[dict[str, Any]], count: int) -> Table:
    shown = Table(title=f"int4, groups of 128, {count} rows of calibration text, one thread")
    heads = "tool|version|CPU s|peak MiB|held-out error|KL|ptm to it: CPU|memory|error|KL"
    for head in heads.split("|"):
        shown.add_column(head, justify="left" if head == "tool" else "right")
    ours = next(row for row in rows if row["name"] == OURS)
    keys = ("cpu_s", "peak_bytes", "output_error", "kl")
    for row in rows:
        if "kl" not in row:
            shown.add_row(row["name"], "failed" if row.get("folder") else "not installed")
            continue
        values = (f"{row['cpu_s']:.1f}", f"{row['peak_bytes'] / show.MIB:,.0f}",
                  f"{row['output_error']:.3e}", f"{row['kl']:.3e}")  # fmt: skip
        ratios = [f"{ours[key] / row[key]:.2f}" if "kl" in ours else "" for key in keys]
        shown.add_row(row["name"], row["version"], *values, *ratios)
    return shown
