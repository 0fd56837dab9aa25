"""Several engines measured on one machine so that its moods touch all alike.

    parent     A: build, warm up   B: build, warm up   | A round 1   B round 1   A round 2   B ...
    A's ranks  [=================] waiting on a file     [=======]   waiting     [=======]

Every contestant is a group of ranks of its own under torchrun, in a network namespace of its own
where that is allowed, so that its loopback device counts its bytes and nobody else's. One runs at a
time: its ranks wait for a file that the parent writes (ptm/bench/contestant.py is their side). What
is compared is a ratio within one round, then the median of rounds, with the least and the most.

A contestant that fails keeps its error as its result; the others go on.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ptm.common import env
from ptm.common.agent import stop_with_parent
from ptm.common.errors import RecipeError, line
from ptm.jobs import StepBenchJob

POLL_S = 0.05
END_S = 40.0  # torchrun gives its ranks 30
NAMESPACE = ("unshare", "-n")
LO_UP = 'ip link set lo up && exec "$@"'


@dataclass(frozen=True)
class Contestant:
    """One row: recipe words on top of the shared ones, and what its engine is told besides."""

    name: str
    words: tuple[str, ...]
    options: dict[str, bool] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    peer: str | None = None
    "Who trains instead of ptm, of ptm/bench/peers.py."


class Spread(NamedTuple):
    """Median of rounds, with the least and the most."""

    least: float
    median: float
    most: float


@dataclass
class Result:
    """What a contestant came to: rounds, or the error that ended it."""

    name: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    version: str = ""

    def spread(self, value: Callable[[dict[str, Any]], float]) -> Spread:
        return spread([value(one) for one in self.rounds])

    def ratio(self, base: Result, value: Callable[[dict[str, Any]], float]) -> Spread:
        """`value` here over `value` of `base` in the same round."""
        pairs = zip(self.rounds, base.rounds)
        return spread([value(mine) / value(other) for mine, other in pairs if value(other)])


def spread(values: Sequence[float]) -> Spread:
    if not values:
        return Spread(*[float("nan")] * 3)
    return Spread(min(values), statistics.median(values), max(values))


def run_rounds(
    contestants: Sequence[Contestant],
    *,
    folder: Path,
    ranks: int,
    num_rounds: int,
    steps: int,
    warmup: int,
    timeout_s: float,
) -> list[Result]:
    """Warm each up, then measure them in turns. `folder` takes their logs."""
    is_isolated = can_isolate()
    running: list[Running] = []
    results = [Result(c.name) for c in contestants]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
            bar = progress.add_task("", total=len(contestants) * (num_rounds + 1))
            for number, contestant in enumerate(contestants):
                place = folder / f"{number}-{contestant.name.replace(' ', '-')}"
                job = {
                    "words": list(contestant.words),
                    "options": contestant.options,
                    "peer": contestant.peer,
                    "steps": steps,
                    "warmup": warmup,
                }
                running.append(Running(contestant, place, job, ranks, is_isolated=is_isolated))
            for turn in range(num_rounds + 1):
                for one, result in zip(running, results):
                    what = f"round {turn}" if turn else "warm-up"
                    progress.update(bar, description=f"{one.contestant.name}: {what}")
                    if result.error is None:
                        _take_turn(one, result, turn, timeout_s)
                    progress.advance(bar)
    finally:
        for one in running:
            one.end()
    return results


def chosen(rows: Sequence[Contestant], only: Sequence[str], base: str) -> list[Contestant]:
    """`base` and those that are asked for; all where none is. Raises RecipeError."""
    names = [row.name for row in rows]
    for name in only:
        if name not in names:
            remedy = f"choose of {', '.join(names)}"
            raise RecipeError(line("only", name, "is no contestant of this bench", remedy))
    return [row for row in rows if not only or row.name in {*only, base}]


def run_bench(bench: StepBenchJob, contestants: Sequence[Contestant]) -> list[Result]:
    """`run_rounds` as a bench of steps asks for it."""
    return run_rounds(
        contestants,
        folder=Path(bench.out),
        ranks=bench.ranks,
        num_rounds=bench.rounds,
        steps=bench.round_steps,
        warmup=bench.warmup,
        timeout_s=bench.turn_timeout_s,
    )


def _take_turn(one: Running, result: Result, turn: int, timeout_s: float) -> None:
    try:
        found = one.turn(turn, timeout_s)
    except ContestantFailed as error:
        result.error = str(error)
        result.version = error.version
        one.end()
        return
    result.version = found["version"]
    if turn:
        result.rounds.append(found)


class ContestantFailed(Exception):
    """A contestant's own last words."""

    def __init__(self, text: str, version: str = "") -> None:
        super().__init__(text)
        self.version = version


class Running:
    """The ranks of one contestant, started and waiting."""

    def __init__(
        self,
        contestant: Contestant,
        folder: Path,
        job: dict[str, Any],
        ranks: int,
        *,
        is_isolated: bool,
    ) -> None:
        self.contestant, self.folder, self.ranks = contestant, folder, ranks
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.json"):
            old.unlink()
        for old in folder.glob("go-*"):
            old.unlink()
        (folder / "job.json").write_text(json.dumps({**job, "is_isolated": is_isolated}))
        command = [
            *((*NAMESPACE, "sh", "-c", LO_UP, "sh") if is_isolated else ()),
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1"),
            *("--master-port", str(free_port()), "-m", "ptm.bench.contestant", str(folder)),
        ]
        variables = {"OMP_NUM_THREADS": "1", **contestant.variables}
        with open(folder / "log.txt", "w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env.child(**variables),
                start_new_session=True,
                preexec_fn=stop_with_parent,  # a bench that is killed leaves no ranks behind
            )

    def turn(self, number: int, timeout_s: float) -> dict[str, Any]:
        """Let it run, and give the sums over its ranks. Raises ContestantFailed."""
        (self.folder / f"go-{number}").touch()
        files = [self.folder / f"turn-{number}-{rank}.json" for rank in range(self.ranks)]
        deadline = time.monotonic() + timeout_s
        while not all(file.exists() for file in files):
            failed = list(self.folder.glob("error-*.json"))
            if failed:
                told = json.loads(failed[0].read_text())
                raise ContestantFailed(told["error"], told["version"])
            if self.process.poll() is not None:
                raise ContestantFailed(last_words(self.folder / "log.txt"))
            if time.monotonic() > deadline:
                raise ContestantFailed(f"no answer within {timeout_s:.0f} s")
            time.sleep(POLL_S)
        return join([json.loads(file.read_text()) for file in files])

    def end(self) -> None:
        """torchrun ends its ranks when it is asked to; they are in sessions of their own."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def join(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One round from what its ranks saw: time and memory of the worst, sums of the rest."""
    sums = ("tokens", "cpu_s", "ledger_bytes", "bound_bytes")
    worst = ("seconds", "peak_bytes")
    found: dict[str, Any] = {key: sum(rank[key] for rank in ranks) for key in sums}
    found |= {key: max(rank[key] for rank in ranks) for key in worst}
    found |= {key: ranks[0][key] for key in ("wire_bytes", "least_bytes", "steps", "version")}
    reports = [rank["report"] for rank in ranks]
    found["report"] = {key: sum(r.get(key, 0.0) for r in reports) for key in reports[0]}
    found["loss"] = ranks[0]["loss"]
    return found


def can_isolate() -> bool:
    """Whether a process may have a network of its own here."""
    try:
        command = [*NAMESPACE, "sh", "-c", LO_UP, "sh", "true"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def last_words(log: Path) -> str:
    """How torchrun says that a rank ended, or the last line."""
    text = log.read_text(errors="replace")
    code = re.search(r"exitcode *: (-?\d+)", text)
    if code is not None:
        is_killed = int(code[1]) == -signal.SIGKILL
        why = ": the system kills so when memory is short; fewer contestants need less"
        return f"a rank ended with code {code[1]}{why if is_killed else ''} ({log})"
    lines = [row for row in text.splitlines() if row.strip()]
    return lines[-1] if lines else "ended without a word"
