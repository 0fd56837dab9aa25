"""A run that was killed, stopped or moved to other ranks is the run that was not."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.runs import finish

pytestmark = pytest.mark.slow
STEPS = 20


@pytest.fixture(scope="module")
def whole(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on 2 ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(runs.launch(2, runs.words(folder, text), cache))
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    assert runs.log(folder) == runs.log(whole)
    assert runs.digests(folder, STEPS) == runs.digests(whole, STEPS)


def test_same_seed_twice(whole: Path, text: Path, cache: Path, tmp_path: Path) -> None:
    finish(runs.launch(2, runs.words(tmp_path / "run", text), cache))
    assert_same_run(tmp_path / "run", whole)


def test_another_seed_differs(whole: Path, text: Path, cache: Path, tmp_path: Path) -> None:
    finish(runs.launch(2, runs.words(tmp_path / "run", text, train__seed=7), cache))
    assert runs.digests(tmp_path / "run", STEPS) != runs.digests(whole, STEPS)


def ranks_of(agent: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    try:
        return [int(pid) for pid in children.read_text().split()]
    except OSError:
        return []


def last_step(folder: Path) -> int:
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return 0
    whole = [row for row in lines if row.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


AFTER_KILLS = 220  # more steps than ten kills let through


def test_ten_kills_in_a_row(text: Path, cache: Path, tmp_path: Path) -> None:
    """kill -9 of a random rank at a random instant, while it starts, steps or saves."""
    changes = {"train.steps": AFTER_KILLS, "checkpoint.interval": 4, "eval.interval": 100}
    finish(runs.launch(2, runs.words(tmp_path / "whole", text, **changes), cache))
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    folder = tmp_path / "run"
    command = runs.command(2, runs.words(folder, text, **changes))
    for kill in range(10):
        with open(tmp_path / "out.txt", "w+") as out:
            agent = subprocess.Popen(
                command, env=runs.environment(cache), stdout=out, stderr=subprocess.STDOUT
            )
            target = last_step(folder) + rng.randint(1, 12)
            deadline = time.monotonic() + (rng.uniform(0.0, 8.0) if rng.random() < 0.3 else 120.0)
            while time.monotonic() < deadline and last_step(folder) < target:
                assert agent.poll() is None, (kill, (tmp_path / "out.txt").read_text()[-3000:])
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.2))
            victims = ranks_of(agent)
            if victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
            else:
                agent.kill()
            assert agent.wait(timeout=120) != 0
            out.seek(0)
            assert "Traceback" not in out.read()
    finish(runs.launch(2, runs.words(folder, text, **changes), cache))
    assert runs.log(folder) == runs.log(tmp_path / "whole")
    assert runs.digests(folder, AFTER_KILLS) == runs.digests(tmp_path / "whole", AFTER_KILLS)


@pytest.mark.parametrize("world", [1, 3, 4])
def test_moved_to_other_ranks(world: int, text: Path, cache: Path, tmp_path: Path) -> None:
    """A checkpoint of 2 ranks goes on with the same data in the same order on 1, 3 and 4."""
    folder, straight = tmp_path / "run", tmp_path / "straight"
    for name, ranks, steps in ((straight, 2, 10), (folder, 2, 5), (folder, world, 10)):
        # A cosine would end at another rate after 5 steps than after 10.
        words = runs.words(name, text, train__steps=steps, train__schedule="constant")
        finish(runs.launch(ranks, words, cache))
    for got, expected in zip(runs.log(folder), runs.log(straight), strict=True):
        assert got["tokens"] == expected["tokens"]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["expert_load"].keys() == expected["expert_load"].keys()


def test_ranks_and_micro_batches_do_not_matter(text: Path, cache: Path, tmp_path: Path) -> None:
    """2 ranks x micro-batch 2 against 1 rank x 4, in fp32, over 20 steps."""
    for name, world, micro in (("two", 2, 2), ("one", 1, 4)):
        words = runs.words(tmp_path / name, text, train__micro_batch_size=micro)
        finish(runs.launch(world, words, cache))
    one, two = (runs.log(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
    state = [runs.tensors(tmp_path / name, STEPS) for name in ("one", "two")]
    for key, weight in state[0].items():
        if key.startswith("model."):
            assert float((weight - state[1][key]).norm() / weight.norm()) < 1e-6, key


@pytest.mark.parametrize("who", ["agent", "rank"])
def test_a_signal_saves_and_the_run_goes_on(
    who: str, whole: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    changes = {"train.steps": 300, "checkpoint.interval": 1000, "eval.interval": 1000}
    words = runs.words(folder, text, **changes)
    agent = subprocess.Popen(
        runs.command(2, words),
        env=runs.environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while last_step(folder) < 7 and agent.poll() is None:
        time.sleep(0.01)
    os.kill(agent.pid if who == "agent" else ranks_of(agent)[1], signal.SIGTERM)
    out, _ = agent.communicate(timeout=60)
    assert agent.returncode == 75, out[-3000:]
    assert "Traceback" not in out and "saved after step" in out
    stopped = last_step(folder)
    assert (folder / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()
    finish(runs.launch(2, words, cache))
    finish(runs.launch(2, runs.words(tmp_path / "straight", text, **changes), cache))
    assert runs.log(folder) == runs.log(tmp_path / "straight")
