"""A stop before the first step: one line, the code of a stop, and no folder, in every mode."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import runs

pytestmark = pytest.mark.slow
TUNED = {"train.seq_len": 64, "train.batch_tokens": 64 * 16, "train.micro_batch_size": 8}
MODES = {
    "pretrain": {},
    "sft": {"mode": "sft", "sft.answers": 0},
    "prompt": {"mode": "sft", "adapter.kind": "prompt", "sft.answers": 0},
    "dpo": {"mode": "dpo", "dpo.task_rows": 40},
    "grpo": {"mode": "grpo", "grpo.task_rows": 40, "grpo.max_new_tokens": 16},
}


def stopped(command: list[str], cache: Path, *, behind: str, who: int | None = None) -> str:
    """stderr of a run that got SIGTERM as soon as it had printed `behind`; who: one of its ranks
    gets it, in place of the process that was started."""
    with subprocess.Popen(
        command, env=runs.environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while behind not in (row := process.stdout.readline()):
            assert row or process.poll() is None, process.communicate()[1]
        pid = process.pid
        if who is not None:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pid = int(children[who])
        os.kill(pid, signal.SIGTERM)
        begun = time.monotonic()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert time.monotonic() - begun < 20
    return err


LINE = "signal=SIGTERM: stopped before the first step of this start; the same command goes on\n"


@pytest.mark.parametrize("behind", ["recipe ", "kernels: "])
@pytest.mark.parametrize("mode", list(MODES))
def test_a_start(
    mode: str, behind: str, base: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    changes = MODES[mode] if mode == "pretrain" else TUNED | MODES[mode] | {"train.init_from": base}
    words = runs.words(tmp_path / "run", text, **changes)
    assert stopped(runs.command(0, words), cache, behind=behind) == LINE
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("who", [None, 1])
@pytest.mark.parametrize("behind", ["recipe ", "collectives: "])
def test_ranks(behind: str, who: int | None, text: Path, cache: Path, tmp_path: Path) -> None:
    words = runs.words(tmp_path / "run", text)
    assert stopped(runs.command(2, words), cache, behind=behind, who=who) == LINE


def test_the_first_held_out_answers(base: Path, text: Path, cache: Path, tmp_path: Path) -> None:
    changes = TUNED | MODES["grpo"] | {"train.init_from": base, "grpo.eval_prompts": 1000}
    words = runs.words(tmp_path / "run", text, **changes | {"grpo.task_rows": 20_000})
    assert stopped(runs.command(0, words), cache, behind="held out") == LINE
    assert not (tmp_path / "run").exists()


def test_a_run_that_had_begun_is_left_as_it_was(text: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.finish(runs.launch(0, runs.words(folder, text, train__steps=5), cache))
    before = runs.log(folder)
    words = runs.words(folder, text)
    assert stopped(runs.command(0, words), cache, behind="resuming after step 5") == LINE
    assert runs.log(folder) == before
    runs.finish(runs.launch(0, words, cache))
    assert len(runs.log(folder)) == 20
