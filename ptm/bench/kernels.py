"""`ptm bench kernels`: every compiled kernel against torch and others, and against the machine.

A case is one computation on fixed inputs with a row for each contestant: ours on each instruction
set, torch's best, the published code. Contestants take turns within a round, so that the machine's
moods touch all alike; a row has the least and the median time, the ratio of the first contestant
(ours) to it, its distance from the same computation in fp64 (relative Frobenius), and how near it
comes to what the machine can do: bytes that must move over the bandwidth of a triad of as many
bytes (so with the same caches), operations over the peak rate, both measured in the same run. The
peak is the best found before and after the cases; its operands are zeros, and tiles with other
numbers in them were measured to run at 0.8 of it.

With one thread, time is CPU time of the thread (the op waits for nothing); with more, wall time.
An op's cases are a function in CASES, in ptm/bench/kernel_*.py.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
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
from torch import Tensor

from ptm.bench import (
    kernel_attention,
    kernel_chart,
    kernel_lfa,
    kernel_moe,
    kernel_products,
    kernel_rows,
)
from ptm.bench.kernel_case import Case
from ptm.common.errors import RecipeError, StorageError, line
from ptm.jobs import KernelBenchJob
from ptm.kernels import native

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "add_rmsnorm": kernel_rows.add_rmsnorm,
    "rope_qk": kernel_rows.rope_qk,
    "attn_router": kernel_rows.attn_router,
    "attention": kernel_attention.attention,
    "lfa": kernel_lfa.lfa_cases,
    "moe_mlp": kernel_moe.moe_mlp,
    "wq_linear": kernel_products.wq_linear_cases,
    "wq_moe": kernel_products.wq_moe_cases,
    "linear_ce": kernel_products.linear_ce,
    "fake_quant": kernel_rows.fake_quant_cases,
    "add_pieces": kernel_rows.add_pieces_cases,
}
WARM_S, TURNS, TRIES = 0.2, 1 << 16, 10


def run(bench: KernelBenchJob) -> None:
    """Measure the cases of the ops, print a table each. Raises RecipeError for an unknown op."""
    for op in bench.op:
        if op not in CASES:
            raise RecipeError(
                line("op", op, f"must be one of {', '.join(CASES)}", "pick one, or leave op out")
            )
    if native.isa() is None:
        rule = "there is no compiled kernel to measure (no library, or PTM_BACKEND=reference)"
        raise RecipeError(line("bench", "kernels", rule, "run csrc/build.py"))
    before = torch.get_num_threads()
    torch.set_num_threads(bench.threads)
    try:
        found = _measure_all(bench)
    finally:
        torch.set_num_threads(before)
    console = Console()
    console.width = max(console.width, 120)  # a table in a log file is not wrapped
    for rows in found["cases"]:
        console.print(table(rows))
    for path, text in [
        (bench.json, json.dumps(found, indent=1) + "\n"),
        (bench.svg, kernel_chart.draw(found)),
    ]:
        if path:
            _write(path, text)


def _measure_all(bench: KernelBenchJob) -> dict[str, Any]:
    cases = [case for op in bench.op or CASES for case in CASES[op]()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("the machine", total=len(cases) * bench.rounds)
        peak, taken = flops_per_s(), []
        for case in cases:
            progress.update(bar, description=f"{case.op}: {case.what}")
            taken.append(_take_turns(case, bench, lambda: progress.advance(bar)))
            peak = max(peak, flops_per_s())  # a neighbour of the core may have its tiles now
        found = [_summary(case, times, peak) for case, times in zip(cases, taken)]
    return {
        "bench": "kernels",
        "machine": platform.processor() or platform.machine(),
        "isa": native.isa(),
        "torch": torch.__version__,
        "threads": bench.threads,
        "rounds": bench.rounds,
        "flops_per_s": peak,
        "cases": found,
    }


def _take_turns(
    case: Case, bench: KernelBenchJob, advance: Callable[[], None]
) -> dict[str, list[float]]:
    clock = time.thread_time if bench.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in case.contestants}
    for run in case.contestants.values():
        end = time.perf_counter() + WARM_S / len(case.contestants)
        run()
        while time.perf_counter() < end:
            run()
    for _ in range(bench.rounds):
        for name, run in case.contestants.items():
            start = clock()
            run()
            times[name].append(clock() - start)
        advance()
    return times


def _summary(case: Case, times: dict[str, list[float]], peak: float) -> dict[str, Any]:
    exact, bandwidth = case.exact(), bytes_per_s(case.bytes)
    ours = times[next(iter(times))]
    rows = []
    for name, taken in times.items():
        least, median = min(taken), statistics.median(taken)
        rows.append(
            {
                "name": name,
                "least_s": least,
                "median_s": median,
                "ratio_least": least / min(ours),
                "ratio_median": statistics.median(t / o for t, o in zip(taken, ours)),
                "of_bytes": case.bytes / least / bandwidth,
                "of_flops": case.flops / least / peak,
                "error": _error(case.contestants[name](), exact),
            }
        )
    facts = {"op": case.op, "case": case.what, "bytes": case.bytes, "flops": case.flops}
    return {**facts, "bytes_per_s": bandwidth, "rows": rows}


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The worst of the results: norm of the difference over the norm."""
    return max(
        ((a.double() - b).norm() / b.norm().clamp(min=1e-300)).item()
        for a, b in zip(found, exact, strict=True)
    )


def bytes_per_s(size: float) -> float:
    """The bandwidth of a triad over `size` bytes, the best of several tries."""
    n = max(int(size / 12), 1)
    a, b, c = (torch.ones(n) for _ in range(3))
    return 12 * n / min(_seconds("roofline_triad", a, b, c, n) for _ in range(TRIES))


def flops_per_s() -> float:
    """The rate of multiply-adds, bf16 with AMX and fp32 without, the best of several tries."""
    flops = torch.zeros(1, dtype=torch.float64)
    seconds = min(_seconds("roofline_multiply", flops, TURNS) for _ in range(TRIES))
    return flops.item() / seconds


def _seconds(name: str, *args: Any) -> float:
    start = time.perf_counter()
    native.call(name, *args)
    return time.perf_counter() - start


def table(case: dict[str, Any]) -> Table:
    """One case: a row for each contestant."""
    caption = f"triad {case['bytes_per_s'] / 1e9:.1f} GB/s"
    shown = Table(title=f"{case['op']}: {case['case']}", caption=caption)
    heads = "contestant|least ms|median ms|x ours, least|x ours, median|of bytes/s|of FLOP/s|error"
    for head in heads.split("|"):
        shown.add_column(head, justify="left" if head == "contestant" else "right")
    for row in case["rows"]:
        shown.add_row(
            row["name"],
            f"{row['least_s'] * 1e3:.3f}",
            f"{row['median_s'] * 1e3:.3f}",
            f"{row['ratio_least']:.2f}",
            f"{row['ratio_median']:.2f}",
            f"{row['of_bytes']:.0%}",
            f"{row['of_flops']:.0%}" if case["flops"] else "",
            f"{row['error']:.1e}",
        )
    return shown


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise StorageError(line("file", path, rule, "name another")) from error
