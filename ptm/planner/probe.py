"""How fast this machine is: measured once in a few seconds, and kept in the user's cache folder.

    rates      products, experts, attention, vocabulary, memory, the optimizer, gloo's loopback
    the job    blocks and the root of its model, forward and backward (ptm/planner/job_time.py)
    the disk   ptm/engine/tier.py's probe, under engine.ssd_path

Kept in speed.json by processor, torch version, kernels and threads; jobs by their shapes. Only
`ptm plan` measures; a run takes what is kept, so that ranks never measure against each other. Jobs
whose block would take longer than a few seconds are planned by the rates. Times are medians: on a
shared machine they are what it gave then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ptm.common import env
from ptm.common.device import best_device
from ptm.engine import tier
from ptm.engine.split import join, split
from ptm.engine.stream import CHUNK
from ptm.kernels import native
from ptm.kernels.adamw import Stored
from ptm.kernels.attention import causal_attention
from ptm.kernels.loss import linear_cross_entropy
from ptm.kernels.moe_mlp import moe_mlp
from ptm.mesh.loopback import measure_loopback
from ptm.optim.adamw import AdamW
from ptm.optim.config import OptimConfig
from ptm.planner import states
from ptm.planner.hardware import Hardware
from ptm.planner.job import Job
from ptm.planner.job_time import PRECISIONS, Clock, time_job
from ptm.planner.speed import Speed, Timed

_WAY = 2
"""Of measuring: what was kept by another is measured anew."""
_REPEATS = 7
_DISK_S = 1.0


def with_speed(
    hardware: Hardware, job: Job, *, may_measure: bool, ssd_path: Path | None = None
) -> Hardware:
    """The machine with its speed, as far as it is known or may be measured."""
    threads = _threads(hardware.ranks_per_node)
    kept = _load(machine := _machine_key(job, threads))
    wanted = _wanted(job, kept, ssd_path)
    if wanted and may_measure:
        with _told(len(wanted)) as advance, _limited_to(threads):
            for name, measure in wanted:
                kept[name] = measure(kept)
                advance()
        _save(machine, kept)
    if "rates" not in kept:
        return hardware
    rates = dict(kept["rates"])
    disk = kept.get(_disk_key(ssd_path), {})
    timed = kept.get(_job_key(job))
    busy = hardware.ranks_per_node * threads / (psutil.cpu_count() or 1)
    speed = Speed(
        **{**rates, **disk, "link": kept.get(_link_key(job), 1e9)},
        slowdown=max(1.0, busy) if job.device == "cpu" else 1.0,
        is_measured=True,
        timed=Timed(**timed) if timed else None,
    )
    how = "its blocks timed" if timed else "by its rates"
    return replace(hardware, speed=speed, speed_why=f"measured on this machine, {how}")


def _wanted(
    job: Job, kept: dict[str, Any], ssd_path: Path | None
) -> list[tuple[str, Callable[[dict[str, Any]], Any]]]:
    """What is not known yet, in the order in which it is measured."""
    found: list[tuple[str, Callable[[dict[str, Any]], Any]]] = []
    if "rates" not in kept:
        found.append(("rates", lambda _: _rates(job)))
    if job.ranks > 1 and _link_key(job) not in kept:
        found.append((_link_key(job), lambda _: measure_loopback(_message(job)).bytes_per_s))
    if _job_key(job) not in kept:
        found.append((_job_key(job), lambda kept: time_job(job, kept["rates"])))
    if ssd_path is not None and _disk_key(ssd_path) not in kept:
        found.append((_disk_key(ssd_path), lambda _: _disk(ssd_path, job)))
    return found


# The rates.


def _rates(job: Job) -> dict[str, Any]:
    device = best_device()
    precisions = {p: _flops_per_s(dtype, device) for p, dtype in PRECISIONS.items()}
    adam = _adam(torch.device("cpu"))
    memory = _copy(device)
    return {
        "flops_per_s": precisions,
        "memory": memory,
        "network": 1.25e9,  # 10 Gbit/s: nothing is known of other machines
        "latency": measure_loopback(2**16).latency_s,
        "adam": _adam(device) if device.type == "cuda" else adam,
        "host": memory if device.type == "cpu" else _copy(device, to="cpu"),
        "host_adam": adam,
        "ssd_read": 0.5e9,
        "ssd_write": 0.5e9,
    }


def _flops_per_s(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Forward and backward of each kind of work, at sizes of a small model on a CPU."""
    scale = 1 if device.type == "cpu" else 8
    D, F, T, V, L = 256 * scale, 512 * scale, 1024 * scale, 4096 * scale, 512
    rows = T // 8 * 8

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).mul_(0.02).to(dtype).requires_grad_()

    x, w = made(T, D), made(2 * D, D)
    w1, w2 = made(8, 2 * F, D), made(8, D, F)
    counts = torch.full((8,), rows // 8, device=device)
    ids = torch.arange(rows, device=device).remainder(8)[:, None]
    q, k, v = (made(1, 4, L, 128) for _ in range(3))
    head, labels = made(V, D), torch.zeros(T, dtype=torch.int64, device=device)
    work = {
        "dense": (lambda: x @ w.t(), 2 * T * D * 2 * D),
        "experts": (lambda: moe_mlp(x, ids, None, counts, w1, w2), 2 * rows * 3 * D * F),
        "attention": (lambda: causal_attention(q, k, v), 2 * L * 4 * 128 * L),
        "head": (lambda: linear_cross_entropy(x, head, labels), 2 * T * V * D),
    }
    return {
        kind: 3 * count / _median(lambda run=run: run().sum().backward(), device)
        for kind, (run, count) in work.items()
    }


def _copy(device: torch.device, to: str | None = None) -> float:
    """Bytes a second, read and written, of a copy beyond caches; to another device: bytes moved."""
    a = torch.zeros(2**24, device=device)
    b = torch.zeros(2**24, device=to or device, pin_memory=to == "cpu")
    seconds = _median(lambda: b.copy_(a, non_blocking=True), device)
    return (1 if to else 2) * a.nbytes / seconds


def _adam(device: torch.device) -> float:
    """Parameters a second of the update as the engine does it, chunk by chunk, split masters,
    beyond caches."""
    chunks, rule = 64, AdamW(OptimConfig())
    fp32 = [torch.full((chunks, CHUNK), 1e-3, device=device) for _ in range(3)]
    weight = torch.zeros(chunks, CHUNK, dtype=torch.bfloat16, device=device)
    rest = torch.zeros(chunks, CHUNK, dtype=torch.int16, device=device)
    master, grad = (torch.empty(CHUNK, device=device) for _ in range(2))

    def sweep() -> None:
        for summed, m, v, near, left in zip(*fp32, weight, rest):
            values = {"step": 5, "lr": 1e-3}
            stored = Stored(near, left, m, v)
            if not rule.sweep(stored, summed, scale=0.5, middle=CHUNK, **values):
                torch.mul(summed, 0.5, out=grad)
                join(near, left, master)
                rule(master, grad=grad, exp_avg=m, exp_avg_sq=v, decay=True, **values)
                split(master, near, left)

    return chunks * CHUNK / _median(sweep, device)


def _disk(path: Path | None, job: Job) -> dict[str, float]:
    assert path is not None
    path.mkdir(parents=True, exist_ok=True)
    found = tier.probe(path, job.page_bytes, _DISK_S)
    return {"ssd_read": found.read_bytes_per_s, "ssd_write": found.write_bytes_per_s}


def _median(run: Callable[[], Any], device: torch.device) -> float:
    clock, times = Clock(device), []
    for _ in range(_REPEATS):
        clock.lap()
        run()
        times.append(clock.lap())
    return statistics.median(times[2:])


# The cache.


def _threads(local_ranks: int) -> int:
    """Threads of one rank; torchrun gives each of several ranks one."""
    return torch.get_num_threads() if local_ranks == 1 else 1


def _machine_key(job: Job, threads: int) -> str:
    names = {platform.node(), platform.machine(), _processor(), job.device, f"way {_WAY}"}
    if job.device == "cuda":
        names.add(torch.cuda.get_device_name())
    kernels = f"kernels {native.isa() or 'of torch'} {native.digest()}"
    return f"{' '.join(sorted(names))}, torch {torch.__version__}, {kernels}, {threads} threads"


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        rows = []
    named = next((row for row in rows if row.startswith("model name")), "")
    return named.partition(":")[2].strip() or platform.processor()


def _job_key(job: Job) -> str:
    shape = dataclasses.asdict(replace(job.model, num_hidden_layers=1))
    numbers = (job.micro_rows, job.seq_len, job.precision)
    text = json.dumps([shape, numbers], sort_keys=True, default=str)
    return f"job {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _message(job: Job) -> int:
    """Bytes that one rank sends another when a block is gathered, to the power of two."""
    size = states.layout(job).units[1].numel * job.compute_bytes // job.ranks
    return 2 ** min(26, max(12, round(size).bit_length()))


def _link_key(job: Job) -> str:
    return f"link {_message(job)}"


def _disk_key(path: Path | None) -> str:
    return f"disk {path.absolute()}" if path is not None else ""


def _file() -> Path:
    return env.cache_dir() / "speed.json"


def _load(machine: str) -> dict[str, Any]:
    """What is kept of a machine; a file that cannot be read is as good as none."""
    try:
        kept = json.loads(_file().read_text())[machine]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _save(machine: str, kept: dict[str, Any]) -> None:
    """Keep it for the next plan; where that cannot be, the next one measures again."""
    try:
        whole = json.loads(_file().read_text())
    except (OSError, ValueError):
        whole = {}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        new = _file().with_suffix(f".{time.monotonic_ns()}")
        new.write_text(json.dumps({**whole, machine: kept}, indent=1) + "\n")
        new.replace(_file())
    except OSError:
        return


@contextmanager
def _limited_to(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _told(count: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring this machine", total=count)
        yield lambda: progress.advance(task)
