"""What a run says while it trains: metrics.jsonl, events.jsonl, the console, and a copy in wandb.

    metrics = Metrics(run_dir, log, total_steps=2000, start_step=120, run_name="m32", header=recipe)
    metrics.log(121, {"loss": 5.1, "expert_load": expert_load(counts_LE), ...})
    metrics.event("checkpoint", step=200, took_s=1.2)
    metrics.close()

metrics.jsonl is the truth: one JSON object a step, ascending, each written whole before `log`
returns, so that a killed process loses at most the line it was writing. A resumed run cuts off a
torn last line and every step after the one it resumes from, in one truncation; what follows is then
the same file an uninterrupted run has. events.jsonl (start, resume, checkpoint, skip, stop,
ledger) keeps its past, since the past did happen. Not-a-number is written as null.

The console is ptm/trainer/console.py and wandb ptm/trainer/tracker.py. Nothing here imports torch,
so `--help` and the report do not wait for it. Power loss, as opposed to a killed process, may lose
the last seconds of both files.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ptm.common.config import Choice, config, ranged
from ptm.common.errors import StorageError, line


class WandbMode(Choice):
    """Where wandb sends its copy of the metrics."""

    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


class ProgressKind(Choice):
    """How the console shows a run."""

    auto = "auto"
    rich = "rich"
    plain = "plain"
    off = "off"


@config
class LogConfig:
    """Settings of the run's log; metrics.jsonl is always written."""

    wandb: WandbMode = WandbMode.auto
    """Copy of the metrics in wandb. auto: online when you are logged in, else offline in the run
    folder; it never asks and never stops a run."""
    project: str = "ptm"
    "Project name in wandb."
    progress: ProgressKind = ProgressKind.auto
    "Console display. auto: a live bar on a terminal, plain lines elsewhere."
    plain_every_s: float = ranged(1.0, least=0.0)
    """Least time in seconds between two plain lines; 0 prints every step. The first and last step,
    and evaluated or skipped ones, always print."""


class Cost(Protocol):
    """What one kind of collective has cost (ptm/mesh/collectives.py)."""

    calls: int
    sent_bytes: int
    bound_bytes: int
    seconds: float


class Metrics:
    """The log of one run; made by the loop on every rank, silent on all but the main one.

    `start_step` is the number of steps already done (0 for a new run); `header` is the recipe as a
    plain mapping. Raises StorageError when the run folder cannot be written."""

    def __init__(
        self,
        run_dir: Path | str,
        log: LogConfig,
        *,
        total_steps: int,
        start_step: int = 0,
        is_main: bool = True,
        run_name: str = "",
        header: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self._is_main, self._start_step = is_main, start_step
        self._lock = threading.Lock()  # a checkpoint thread reports its event while the loop logs
        if not is_main:
            return
        from ptm.trainer.console import open_console
        from ptm.trainer.tracker import open_tracker

        self._steps = JsonLines(Path(run_dir) / "metrics.jsonl", last_step=start_step)
        self._events = JsonLines(Path(run_dir) / "events.jsonl")
        self._console = open_console(log, total_steps=total_steps, start_step=start_step)
        self._tracker = open_tracker(
            log,
            run_dir=Path(run_dir),
            run_name=run_name,
            header=header or {},
            warn=self._console.note,
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the finished step number `step` (the first is 1)."""
        if not self._is_main:
            return
        record = plain({"step": step, **values})
        with self._lock:
            self._steps.append(record)
            self._console.step(step, record)
            self._tracker.log(step, record)

    def event(self, kind: str, **fields: Any) -> None:
        """Record something that happens once: `kind` and its fields, with the time (UTC)."""
        if not self._is_main:
            return
        fields = plain(fields)
        with self._lock:
            self._append(kind, fields)
            self._console.note(" ".join([kind, *(f"{k}={v}" for k, v in fields.items())]))

    def _append(self, kind: str, fields: Mapping[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._events.append({"time": now, "kind": kind, **fields})

    def ledger(self, step: int, entries: Mapping[str, Cost]) -> None:
        """Record and show what this rank has sent since the start, beside the least possible."""
        if not self._is_main or not entries:
            return
        collectives = {
            name: {
                "calls": entry.calls,
                "sent_bytes": entry.sent_bytes,
                "bound_bytes": entry.bound_bytes,
                "waited_s": round(entry.seconds, 4),
            }
            for name, entry in entries.items()
        }
        steps = step - self._start_step
        with self._lock:
            self._append("ledger", {"step": step, "steps": steps, "collectives": collectives})
            self._console.ledger(steps, collectives)

    def close(self) -> None:
        """End the display and wandb's run; safe to call twice."""
        if not self._is_main:
            return
        with self._lock:
            self._console.close()
            self._tracker.close()
            self._steps.close()
            self._events.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLines:
    """A file of JSON objects, one a line, that only ever grows, except when it is opened.

    Opening cuts off, in one truncation, a torn last line and, given `last_step`, all steps after
    it."""

    def __init__(self, path: Path, *, last_step: int | None = None) -> None:
        self.path = path
        with self._named_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._file).st_size
            kept = kept_bytes(self._file, size, last_step) if size else 0
            if kept < size:
                os.truncate(self._file, kept)
                os.fsync(self._file)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one object with one system call."""
        text = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        with self._named_errors():
            written = os.write(self._file, text)
            if written != len(text):  # a full disk takes a part first and fails on the next call
                os.write(self._file, text[written:])

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _named_errors(self) -> contextlib.AbstractContextManager[None]:
        return _StorageErrors(self.path)


class _StorageErrors(contextlib.AbstractContextManager[None]):
    def __init__(self, path: Path) -> None:
        self._path = path

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            _refuse(self._path, error)


def _refuse(path: Path, error: OSError) -> NoReturn:
    reason = error.strerror or type(error).__name__
    raise StorageError(
        line("run.dir", path, f"must be writable ({reason})", "free space or choose another folder")
    ) from error


def kept_bytes(file: int, size: int, last_step: int | None) -> int:
    """Length of the part of an open file of JSON lines that a run resumed after `last_step` keeps.

    Reads from the end only as far as it has to: steps ascend, so the first good line settles it.
    """
    with mmap.mmap(file, size, access=mmap.ACCESS_READ) as text:
        end = size
        while end:
            start = text.rfind(b"\n", 0, end - 1) + 1
            record = parse_line(text[start:end])
            if record is not None and (last_step is None or _step_of(record) <= last_step):
                break
            end = start
        return end


def parse_line(text: bytes) -> dict[str, Any] | None:
    """The object of one line, or None when it is torn, not JSON or no object."""
    if not text.endswith(b"\n"):
        return None
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _step_of(record: Mapping[str, Any]) -> float:
    step = record.get("step")
    return step if isinstance(step, int) else math.inf


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays and tensors as lists or numbers, not-a-number as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def expert_load(counts_LE: Any, *, ep: int = 1) -> dict[str, dict[str, Any]]:
    """Per layer: each expert's share of the rows, and how even the shares are.

    Shapes: counts_LE (layers, E) integers, a tensor, array or lists. Entropy is in nats over
    log(E): 1 is even, 0 is one expert for all. `max_over_mean` is the busiest expert over the
    average; `dead` counts experts without a row. A layer that routed no row has shares, entropy and
    max_over_mean of 0, and all experts dead.

    With experts on `ep` ranks, E / ep on each, also how even the work of those ranks is:
    `rank_share` of the rows, and `rank_max_over_mean`, the time of the layer's experts over what it
    would be with even loads.
    """
    rows = counts_LE.tolist() if hasattr(counts_LE, "tolist") else counts_LE
    return {
        str(layer): _load_of(counts_E) | (_rank_load_of(counts_E, ep) if ep > 1 else {})
        for layer, counts_E in enumerate(rows)
    }


def _rank_load_of(counts_E: list[int], ep: int) -> dict[str, Any]:
    total, local = sum(counts_E), len(counts_E) // ep
    share = [sum(counts_E[r * local : (r + 1) * local]) / max(total, 1) for r in range(ep)]
    return {
        "rank_share": [round(part, 5) for part in share],
        "rank_max_over_mean": round(max(share) * ep, 4),
    }


def _load_of(counts_E: list[int]) -> dict[str, Any]:
    total, num_experts = sum(counts_E), len(counts_E)
    share_E = [count / total if total else 0.0 for count in counts_E]
    nats = -sum(share * math.log(share) for share in share_E if share > 0)
    return {
        # Five digits: 24 layers x 32 experts make a line of 6 kB.
        "share": [round(share, 5) for share in share_E],
        "entropy": round(nats / math.log(num_experts), 5) if num_experts > 1 else float(total > 0),
        "max_over_mean": round(max(share_E) * num_experts, 4),
        "dead": sum(count == 0 for count in counts_E),
    }
