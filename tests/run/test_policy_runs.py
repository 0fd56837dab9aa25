"""Runs that learn from pairs and from rewards: killed, also within a rollout, and begun again."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.runs import finish

pytestmark = pytest.mark.slow
STEPS = 6

REWARD = """
import os, time
def paid(question, answer, text):
    if os.path.exists({pause!r}):
        open({paused!r}, "w").close()
        time.sleep(50)
    return len(text) % 5 / 4
"""


def words(folder: Path, base: Path, text: Path, mode: str, **changes) -> list[str]:
    given = {
        "mode": mode,
        "train.init_from": base,
        "train.steps": STEPS,
        "train.seq_len": 64,
        "train.batch_tokens": 64 * 16,
        "train.micro_batch_size": 8,
        "checkpoint.interval": 2,
        "eval.interval": 3,
        "eval.rows": 2,
    }
    if mode in ("dpo", "grpo"):
        given |= {f"{mode}.task_rows": 40, f"{mode}.tasks": "[larger,count]"}
    return runs.words(folder, text, **given | changes)


@pytest.fixture(scope="module")
def base(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to end its answers."""
    folder = tmp_path_factory.mktemp("base")
    finish(runs.launch(0, runs.words(folder / "first", text, train__steps=2), cache))
    changes = {"train.steps": 40, "train.lr": "5e-3", "checkpoint.interval": 40, "sft.answers": 0}
    changes |= {"sft.task_rows": 100, "sft.tasks": "[larger,count]", "eval.interval": 40}
    finish(runs.launch(0, words(folder / "run", folder / "first", text, "sft", **changes), cache))
    return folder / "run"


def kill_when(is_time: Callable[[], bool], command: list[str], cache: Path) -> None:
    """Start a run, and kill it and its children at a time of its own."""
    with subprocess.Popen(
        command,
        env=runs.environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        while not is_time():
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)


def num_logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_pairs_after_a_kill(base: Path, text: Path, cache: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(runs.launch(0, words(whole, base, text, "dpo"), cache))
    log = runs.log(whole)
    assert log[-1]["margin"] != 0 and "eval_accuracy" in log[-1]
    again = words(killed, base, text, "dpo")
    kill_when(lambda: num_logged(killed) >= 3, runs.command(0, again), cache)
    finish(runs.launch(0, again, cache))
    assert runs.log(killed) == log
    assert runs.digests(killed, STEPS) == runs.digests(whole, STEPS)


def test_rewards_after_a_kill_within_a_rollout(
    base: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pause, paused = tmp_path / "pause", tmp_path / "paused"
    reward = tmp_path / "mine.py"
    reward.write_text(REWARD.format(pause=str(pause), paused=str(paused)))
    changes = {
        "grpo.reward": f"{reward}:paid",
        "grpo.reward_timeout_s": 60,
        "grpo.group_size": 4,
        "grpo.max_new_tokens": 6,
        "grpo.eval_prompts": 4,
    }
    finish(runs.launch(0, words(whole, base, text, "grpo", **changes), cache))
    log = runs.log(whole)
    assert any(row["equal_groups"] < 1 and row["grad_norm"] > 0 for row in log[3:])

    again = words(killed, base, text, "grpo", **changes)

    def is_awaited() -> bool:  # a reward of step 4 or later
        if num_logged(killed) >= 3:
            pause.touch()
        return paused.exists()

    kill_when(is_awaited, runs.command(0, again), cache)
    pause.unlink()
    assert len(runs.log(killed)) < STEPS
    finish(runs.launch(0, again, cache))
    assert runs.log(killed) == log
    assert runs.digests(killed, STEPS) == runs.digests(whole, STEPS)


def test_a_signal_within_a_rollout_waits_for_one_answer(
    base: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    pause, paused = tmp_path / "pause", tmp_path / "paused"
    reward = tmp_path / "mine.py"
    reward.write_text(REWARD.format(pause=str(pause), paused=str(paused)).replace("50", "3"))
    changes = {"grpo.reward": f"{reward}:paid", "grpo.group_size": 4, "grpo.eval_prompts": 4}
    changes |= {"grpo.max_new_tokens": 6, "eval.interval": STEPS, "checkpoint.interval": STEPS}
    finish(runs.launch(2, words(whole, base, text, "grpo", **changes), cache))

    again = words(stopped, base, text, "grpo", **changes)
    with subprocess.Popen(
        runs.command(2, again), env=runs.environment(cache), stderr=subprocess.PIPE, text=True
    ) as process:
        while not paused.exists():  # a reward of step 4 or later, of 16 that take 3 s each
            assert process.poll() is None
            if num_logged(stopped) >= 3:
                pause.touch()
            time.sleep(0.005)
        signalled = time.monotonic()
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
        took_s = time.monotonic() - signalled
    pause.unlink()
    assert process.returncode == 75 and took_s < 12, (told, took_s)
    done = len(runs.log(stopped))
    assert f"stopped within the answers of step {done + 1}; the same command goes on" in told
    assert [p.name for p in (stopped / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    shown = finish(runs.launch(2, again, cache))
    assert f"resuming after step {done} from" in shown
    assert runs.log(stopped) == runs.log(whole)
    assert runs.digests(stopped, STEPS) == runs.digests(whole, STEPS)


@pytest.mark.parametrize("is_always", [False, True])
def test_a_reward_that_raises_is_told_once_and_one_that_always_does_ends_the_run(
    base: Path, text: Path, cache: Path, tmp_path: Path, is_always: bool
) -> None:
    reward = tmp_path / "bad.py"
    reward.write_text(
        f"count = 0\ndef bad(question, answer, text):\n    global count\n    count += 1\n"
        f"    print('asked')\n"
        f"    if {is_always} or count % 2: raise ValueError('boom')\n    return 0\n"
    )
    changes = {"grpo.reward": f"{reward}:bad", "grpo.group_size": 4, "grpo.eval_prompts": 4}
    changes |= {"grpo.max_new_tokens": 6, "train.steps": 2}
    done = runs.launch(0, words(tmp_path / "run", base, text, "grpo", **changes), cache)
    told = [row for row in done.stdout.splitlines() if row.startswith("grpo.reward=")]
    assert len(told) == 1 and "ValueError: boom" in told[0]
    if is_always:
        assert done.returncode == 4 and re.search(
            r"^grpo.reward=.*: failed for all \d+ answers of step 1 \(.*: boom \(bad.py:6\)\); "
            rf"mend it \(it printed to {tmp_path}/run/reward.log\), and",
            done.stderr.splitlines()[-1],
        )
        assert "asked" in (tmp_path / "run" / "reward.log").read_text()
        return
    finish(done)
    steps = [row for row in done.stdout.splitlines() if row.startswith("step ")]
    assert any(" raised " in row and " reward 0.000 " in row for row in steps)


def test_bad_rows_are_told_and_too_many_leave_no_folder(
    base: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": f"{i} or {i + 1}?", "answer": "yes"}) for i in range(60)]
    rows[7] = json.dumps({"prompt": "no answer"})
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(rows) + "\n")
    changes = {"grpo.source": source, "grpo.group_size": 4, "train.steps": 2}
    changes |= {"grpo.max_new_tokens": 6, "grpo.eval_prompts": 4, "data.max_bad_fraction": 0}
    refused = runs.launch(0, words(tmp_path / "run", base, text, "grpo", **changes), cache)
    assert refused.returncode == 4 and not (tmp_path / "run").exists()
    told = f"{source}:8: 'answer' is missing or blank, and grpo.reward=exact compares with it"
    assert told in refused.stderr
    changes["data.max_bad_fraction"] = 0.1
    shown = finish(runs.launch(0, words(tmp_path / "run", base, text, "grpo", **changes), cache))
    assert f"1 bad row left out, first {told}" in shown
