"""Fine-tuning runs: killed and resumed, on other ranks, and from a base that is not there."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.processes import ptm
from tests.support.runs import finish

pytestmark = pytest.mark.slow
STEPS = 12


def words(folder: Path, base: Path, text: Path, **changes) -> list[str]:
    given = {
        "mode": "sft",
        "train.init_from": base,
        "train.steps": STEPS,
        "train.seq_len": 64,
        "checkpoint.interval": 4,
        "eval.interval": 6,
        "data.replay": 0.5,
        "sft.task_rows": 200,
        "sft.tasks": "[add,larger,first]",
        "sft.answers": 8,
        "sft.answer_tokens": 8,
    }
    return runs.words(folder, text, **given | changes)


def test_killed_is_as_undisturbed_and_two_ranks_are_as_one(
    base: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    shown = finish(runs.launch(2, words(whole, base, text), cache))
    assert "exact answers, share" in shown and "bits per byte of pretraining text" in shown
    assert "an answer to a held-out question" in shown and "question='...'" in shown
    log = runs.log(whole)
    assert log[-1]["task_loss"] < json.loads((whole / "before.json").read_text())["task_loss"]
    assert all(row["replay_loss"] > 0 for row in log)

    asked = "Which is larger, 3 or 5?"
    env = runs.environment(cache)
    told = {}
    for key in ("question", "prompt"):
        words_of = [f"run={whole}", f"{key}={asked}", "max_new_tokens=8"]
        told[key] = ptm("generate", *words_of, cwd=tmp_path, env=env)
        assert told[key].code == 0, told[key].err
    assert asked in told["prompt"].out and asked not in told["question"].out
    assert told["question"].out.strip()
    both = ptm("generate", f"run={whole}", "question=a", "prompt=b", cwd=tmp_path, env=env)
    assert both.code == 2 and "question=a: excludes prompt" in both.err
    spelled = ptm("generate", f"run={whole}", "question=a<sep>b", cwd=tmp_path, env=env)
    assert spelled.code == 2 and "question=a<sep>b: a message spells" in spelled.err

    command = runs.command(2, words(killed, base, text))
    agent = subprocess.Popen(
        command,
        env=runs.environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = killed / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 6:
        assert agent.poll() is None
        time.sleep(0.02)
    os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    time.sleep(1.0)
    finish(runs.launch(2, words(killed, base, text), cache))
    assert runs.log(killed) == log
    assert runs.digests(killed, STEPS) == runs.digests(whole, STEPS)

    one = tmp_path / "one"
    finish(runs.launch(1, words(one, base, text, train__micro_batch_size=4), cache))
    for a, b in zip(runs.log(one), log, strict=True):
        assert a["tokens"] == b["tokens"]
        for key in ("loss", "grad_norm", "replay_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    assert runs.log(one)[-1]["exact_answers"] == log[-1]["exact_answers"]


def test_a_missing_base_is_one_line(text: Path, cache: Path, tmp_path: Path) -> None:
    done = runs.launch(0, words(tmp_path / "run", tmp_path / "none", text), cache)
    assert done.returncode == 4
    assert "is not there, and fine-tuning starts from it" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "name"), [("prompt", ".soft_tokens"), ("prefix", ".prefix_")])
def test_prompt_trains_soft_tokens_or_a_prefix_only_and_resumes(
    kind: str, name: str, base: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    changes = {
        "adapter.kind": kind,
        "adapter.prompt_tokens": 5,
        "train.lr": "3e-2",
        "train.schedule": "constant",
    }
    whole, again, one = tmp_path / "whole", tmp_path / "again", tmp_path / "one"
    pinned = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    finish(runs.launch(2, words(whole, base, text, **changes), cache))
    names = runs.digests(whole, STEPS)
    assert names and all(name in one for one in names)  # no state of a frozen weight
    log = runs.log(whole)
    assert log[-1]["task_loss"] < json.loads((whole / "before.json").read_text())["task_loss"]
    for steps in (4, STEPS):
        more = changes | {"train.steps": steps}
        finish(runs.launch(2, words(again, base, text, **more), cache))
    assert runs.digests(again, STEPS) == names
    finish(runs.launch(1, words(one, base, text, **changes), cache))
    for a, b in zip(runs.log(one), log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)

    assert {path: path.read_bytes() for path in pinned} == pinned
    env = {"PTM_CACHE": str(cache)}
    found = ptm("eval", f"run={whole}", "rows=4", cwd=tmp_path, env=env)
    assert found.code == 0, found.err
    seen = next(row.split()[1] for row in found.out.splitlines() if row.startswith("bits_per_byte"))
    assert float(seen) == pytest.approx(log[-1]["eval_bits_per_byte"], abs=1e-4)
    words_of = {
        run: ptm(
            "generate", f"run={run}", "prompt=import", "temperature=1", cwd=tmp_path, env=env
        ).out
        for run in (base, whole)
    }
    assert words_of[whole].startswith("import") and words_of[whole] != words_of[base]


def test_lora_trains_the_adapter_only_and_resumes(
    base: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    changes = {"adapter.kind": "lora", "adapter.targets": "[q,v,experts]", "train.lr": "1e-2"}
    whole, again = tmp_path / "whole", tmp_path / "again"
    finish(runs.launch(2, words(whole, base, text, **changes), cache))
    names = runs.digests(whole, STEPS)
    assert names and all(".lora_" in name for name in names)  # no state of a frozen weight
    log = runs.log(whole)
    assert log[-1]["task_loss"] < json.loads((whole / "before.json").read_text())["task_loss"]
    constant = {"train.schedule": "constant"}
    newer = Path(shutil.copytree(base, tmp_path / "newer"))  # a base that goes on between stops
    for folder, stops in ((again, (4, STEPS)), (tmp_path / "straight", (STEPS,))):
        for steps in stops:
            start = newer if folder is again else base
            if steps == STEPS and folder is again:
                finish(runs.launch(0, runs.words(newer, text, train__steps=10), cache))
            more = changes | constant | {"train.steps": steps}
            finish(runs.launch(2, words(folder, start, text, **more), cache))
    assert runs.digests(again, STEPS) == runs.digests(tmp_path / "straight", STEPS)
    assert (
        ptm("eval", f"run={again}", "rows=4", cwd=tmp_path, env={"PTM_CACHE": str(cache)}).code == 0
    )


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_lora_runs_and_resumes_on_engines_that_are_libraries(
    engine: str, base: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    changes = {"adapter.kind": "lora", "adapter.targets": "[q,v,experts]", "train.lr": "1e-2"}
    changes |= {"train.schedule": "constant", "engine.kind": engine, "sft.answers": 2}
    paged, whole, again = (tmp_path / name for name in ("paged", "whole", "again"))
    given = changes | {"engine.kind": "paged", "engine.zero": 3}
    finish(runs.launch(2, words(paged, base, text, **given), cache))
    finish(runs.launch(2, words(whole, base, text, **changes), cache))
    for steps in (4, STEPS):
        finish(runs.launch(2, words(again, base, text, **changes, train__steps=steps), cache))
    names = runs.digests(whole, STEPS)
    assert names == runs.digests(again, STEPS) and all(".lora_" in name for name in names)
    losses = [[row["loss"] for row in runs.log(folder)] for folder in (paged, whole)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0]
