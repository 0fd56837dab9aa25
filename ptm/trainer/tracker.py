"""A copy of the metrics in wandb that can neither ask, nor delay, nor fail the run.

wandb is imported and started on its own thread (2 s of imports and a helper process here, up to 90
s with a dead network), fed through a queue. Whatever it raises ends the copy with one warning:
metrics.jsonl stays the truth. Mode `auto` is online with a key in the environment or netrc, else
offline: a file in the run folder, which `wandb sync` sends later. WANDB_MODE is obeyed. The run's
id is kept in the run folder, so a resumed run continues its curve. Not covered: a wandb that hangs
in its own exit hook after `close` has given up on it.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptm.common import env

if TYPE_CHECKING:
    from ptm.trainer.metrics import LogConfig

Record = Mapping[str, Any]
_MOST_WAITING = 10_000  # steps logged while wandb still starts; more means that it is stuck


class NoTracker:
    """The tracker of `log.wandb=off`."""

    def log(self, step: int, record: Record) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """One wandb run; `warn` is called with one line if it has to give up."""

    def __init__(
        self,
        mode: str,
        *,
        project: str,
        run_dir: Path,
        run_name: str,
        header: Record,
        warn: Callable[[str], None],
    ) -> None:
        self._settings = {
            "mode": mode,
            "project": project,
            "name": run_name or None,
            "config": dict(header),
        }
        self._run_dir = run_dir
        self._warn = warn
        self._is_alive = True
        self._waiting: queue.Queue[tuple[int, Record] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, record: Record) -> None:
        if self._is_alive:
            try:
                self._waiting.put_nowait((step, record))
            except queue.Full:
                self._give_up("it does not take the metrics")

    def close(self, timeout_s: float = 30.0) -> None:
        if not self._is_alive:
            return
        self._waiting.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._give_up(f"it did not finish in {timeout_s:.0f} s")
        self._is_alive = False

    def _give_up(self, reason: str) -> None:
        if self._is_alive:
            self._is_alive = False
            self._warn(
                f"wandb is off for the rest of this run: {reason}; metrics.jsonl has everything"
            )

    def _work(self) -> None:
        # The one place that catches Exception to go on: an optional copy must not fail what it
        # copies.
        try:
            run = self._start()
            while (item := self._waiting.get()) is not None and self._is_alive:
                step, record = item
                run.log(flat(record), step=step)
            run.finish(exit_code=0)
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}".splitlines()[0])

    def _start(self) -> Any:
        env.set_default("WANDB_ERROR_REPORTING", "false")
        import wandb

        folder = self._run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "run_id"
        run_id = id_file.read_text().strip() if id_file.is_file() else uuid.uuid4().hex[:8]
        id_file.write_text(run_id)
        return wandb.init(
            **self._settings,
            dir=str(self._run_dir),
            id=run_id,
            resume="allow" if self._settings["mode"] == "online" else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_stats=True,
                init_timeout=60,
            ),
        )


def open_tracker(
    log: LogConfig, *, run_dir: Path, run_name: str, header: Record, warn: Callable[[str], None]
) -> NoTracker | WandbTracker:
    mode = wandb_mode(log.wandb.value, warn)
    if mode == "off":
        return NoTracker()
    return WandbTracker(
        mode, project=log.project, run_dir=run_dir, run_name=run_name, header=header, warn=warn
    )


def wandb_mode(wanted: str, warn: Callable[[str], None]) -> str:
    """`online`, `offline` or `off`: the setting, else WANDB_MODE, else whether there is a key."""
    if wanted == "auto":
        asked = env.wandb_mode()
        if asked in ("disabled", "off"):
            return "off"
        if asked in ("offline", "dryrun"):
            return "offline"
        return "online" if env.wandb_logged_in() else "offline"
    if wanted == "online" and not env.wandb_logged_in():
        warn(
            "log.wandb=online: you are not logged in, so offline; run `wandb login` to change that"
        )
        return "offline"
    return wanted


def flat(record: Record) -> dict[str, float]:
    """The numbers of a record under one level of names; expert shares are left to the report."""
    numbers = {}
    for name, value in record.items():
        if name == "expert_load" and isinstance(value, Mapping):
            for layer, load in value.items():
                for key in ("entropy", "max_over_mean", "dead"):
                    if isinstance(load.get(key), (int, float)):
                        numbers[f"expert_{key}/layer_{layer}"] = load[key]
        elif isinstance(value, Mapping):
            inner = {f"{name}/{key}": number for key, number in value.items()}
            numbers |= {k: v for k, v in inner.items() if isinstance(v, (int, float))}
        elif isinstance(value, (int, float)) and name != "step":
            numbers[name] = value
    return numbers
