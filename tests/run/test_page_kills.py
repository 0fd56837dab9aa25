"""kill -9 of runs whose pages are on a disk: never more than one step is lost, and no bit.

Six kills through the command line, at random instants of random ranks or of all at once, while
they start, restore, step, commit, evict and save; and forty-four of forked ranks that run the
engine alone, which start in a fraction of the time.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ptm.engine import open_store
from ptm.engine.config import EngineConfig
from tests.run.test_resume import last_step, ranks_of
from tests.support import paged, runs
from tests.support.mesh import mesh_of_test
from tests.support.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.slow

LAST = 100
"""Steps that six kills do not come to: each waits for eight at most, or for the next save."""
LARGER = {
    "model.hidden_size": 64,
    "model.attention_projection_size": 128,
    "model.moe_intermediate_size": 128,
    "model.num_hidden_layers": 6,
    "engine.zero": 3,
    "engine.page_mib": 1,
    "engine.cpu_bytes": "17MiB",
    "eval.interval": 0,
    "checkpoint.interval": 7,
}
"""1.4 M parameters: 12 pages a rank, of which 9 are in memory."""


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    try:
        rows = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    found = [json.loads(row) for row in rows if row.endswith(b"\n")]
    return [row for row in found if row["kind"] == kind]


def wait_for_instant(rng: random.Random, folder: Path, agent: subprocess.Popen[str]) -> str:
    """Until a random instant of a random kind; returns its name."""
    num_begun = len(events(folder, "start") + events(folder, "resume"))
    kind = rng.choice(["start", "restore", "step", "step", "save"])
    deadline = time.monotonic() + 90
    target = last_step(folder) + rng.randint(1, 8)

    def is_there() -> bool:
        if kind == "restore":  # said once the engine has its pages; steps come right after
            return len(events(folder, "start") + events(folder, "resume")) > num_begun
        if kind == "save":
            return any((folder / "checkpoints").glob("*.tmp-*"))
        return last_step(folder) >= target

    if kind == "start":
        deadline = time.monotonic() + rng.uniform(0.0, 8.0)
    while time.monotonic() < deadline and agent.poll() is None and not is_there():
        time.sleep(0.002)
    time.sleep(0.0 if kind == "save" else rng.uniform(0.0, 0.3))
    return kind


def strike(rng: random.Random, agent: subprocess.Popen[str]) -> str:
    """kill -9 of one rank or of all, with the agent."""
    ranks = ranks_of(agent)
    is_one = bool(ranks) and rng.random() < 0.5
    victims = [rng.choice(ranks)] if is_one else [agent.pid, *ranks]
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    agent.wait(timeout=120)
    deadline = time.monotonic() + 60
    while any(is_alive(rank) for rank in ranks):
        assert time.monotonic() < deadline, "a rank outlives its agent"
        time.sleep(0.01)
    return "one" if is_one else "all"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_six_kills_through_the_command_line(text: Path, cache: Path, tmp_path: Path) -> None:
    def words(name: str) -> list[str]:
        keys = LARGER | {"train.steps": LAST, "engine.ssd_path": tmp_path / f"{name}-ssd"}
        return runs.words(tmp_path / name, text, **keys)

    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    folder, most, num_resumed = tmp_path / "run", 0, 0
    out = tmp_path / "out.txt"
    for kill in range(6):
        with out.open("w") as file:
            agent = subprocess.Popen(
                runs.command(2, words("run")),
                env=runs.environment(cache),
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
            kind = wait_for_instant(rng, folder, agent)
            who = strike(rng, agent)
        said = out.read_text(errors="replace")
        assert "Traceback" not in said, said[-3000:]
        resumed = events(folder, "resume")
        if len(resumed) > num_resumed:  # else it was killed before that
            assert resumed[-1]["step"] >= most - 1, (kill, kind, who, most, said[-3000:])
            num_resumed, most = len(resumed), resumed[-1]["step"]
        most = max(most, last_step(folder))
        print(f"kill {kill} of {who} in {kind}: {most} steps logged")
        assert "complete after" not in said, "no step left to kill"
    for name in ("run", "whole"):
        done = runs.launch(2, words(name), cache)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert events(folder, "resume")[-1]["step"] >= most - 1
    assert runs.log(folder) == runs.log(tmp_path / "whole")
    assert runs.digests(folder, LAST) == runs.digests(tmp_path / "whole", LAST)


MODEL = replace(paged.MODEL, hidden_size=64, attention_projection_size=128, num_experts=16,
                moe_intermediate_size=64, num_hidden_layers=6)  # fmt: skip
STEPS = 460


def train_until_killed(rank: int, world: int, folder: str, steps: int) -> Any:
    """The engine as a run has it: each step is logged, then committed in the background."""
    open_store.PROBE_S = 0.05
    said = Path(folder)
    (said / f"pid-{rank}").write_text(str(os.getpid()))
    mesh = mesh_of_test(rank, world, 1)
    ssd = said / "ssd"
    config = EngineConfig(page_mib=1, ssd_path=str(ssd), cpu_bytes="15MiB")
    engine = paged.make_engine(mesh, zero=3, config=config, model=MODEL)
    first = 0 if engine.restored is None else engine.restored[0]
    if rank == 0:
        with (said / "resumed").open("a") as file:
            file.write(f"{first}\n")
    with (said / f"log-{rank}").open("a") as log:
        for step in range(first, steps):
            nll, tokens = paged.backward(engine, mesh, step)
            outcome = engine.step(nll_sum=nll, tokens=tokens, lr=1e-2, flags=[])
            log.write(f"{step + 1} {outcome.loss.hex()}\n")
            log.flush()
            engine.commit(step + 1, {"updates": engine.updates})
    state, report = paged.whole_state(engine), engine.report()
    engine.close()
    return state, report["pages_reads"]


def logged(folder: Path) -> list[tuple[int, str]]:
    """(step, loss) of all whole lines of rank 0's log."""
    text = (folder / "log-0").read_text() if (folder / "log-0").exists() else ""
    rows = text.splitlines(keepends=True)
    return [(int(r.split()[0]), r.split()[1]) for r in rows if r.endswith("\n")]


def kill_later(rng: random.Random, folder: Path) -> str:
    """kill -9 of one rank, or both, at a random instant after they begin."""
    pids = [folder / f"pid-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(pid.exists() and pid.read_text() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    before = len(logged(folder))
    if rng.random() < 0.75:  # else somewhere in the start
        while len(logged(folder)) <= before and time.monotonic() < deadline:
            time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.8))
    victims = rng.choice([pids[:1], pids[1:], pids])
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
    for pid in pids:
        pid.unlink()
    return ", ".join(pid.name for pid in victims)


def test_forty_four_kills_of_the_engine(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    folder, whole = tmp_path / "run", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    losses: dict[int, str] = {}
    most = 0
    for kill in range(44):
        num_resumed = len(resumed_at(folder))
        victims = run_and_kill(rng, folder)
        resumed = resumed_at(folder)
        if len(resumed) > num_resumed:
            assert resumed[-1] >= most - 1, (kill, victims, most)
            most = resumed[-1]
        rows = logged(folder)
        (folder / "log-0").unlink(missing_ok=True)
        for step, loss in rows:
            assert losses.setdefault(step, loss) == loss, (kill, step)
        most = max([most, *(step for step, _ in rows)])
        print(f"kill {kill} of {victims}: {most} steps logged")
        assert most < STEPS, "no step left to kill"
    steps = most + 5
    found = run_ranks(2, train_until_killed, str(folder), steps)
    assert resumed_at(folder)[-1] >= most - 1
    wanted = run_ranks(2, train_until_killed, str(whole), steps)
    assert wanted[0][1] > 0, "no page was ever read back"
    assert losses | dict(logged(folder)) == dict(logged(whole))
    there, here = (paged.assemble([state for state, _ in r]) for r in (wanted, found))
    for name, tensor in there.items():
        assert torch.equal(tensor, here[name]), name


def resumed_at(folder: Path) -> list[int]:
    path = folder / "resumed"
    return [int(row) for row in path.read_text().split()] if path.exists() else []


def run_and_kill(rng: random.Random, folder: Path) -> str:
    said: list[str] = []
    killer = threading.Thread(target=lambda: said.append(kill_later(rng, folder)), daemon=True)
    killer.start()
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, train_until_killed, str(folder), STEPS)
    # The other rank has lost its peer, in whatever it was doing; nothing else may go wrong.
    errors = re.findall(r"^[\w.]*Error\b", str(caught.value), flags=re.MULTILINE)
    assert {e.rpartition(".")[2] for e in errors} <= {"RuntimeError", "HangError"}, caught.value
    killer.join(timeout=60)
    return said[0]
