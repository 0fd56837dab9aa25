"""LoRA on codes of an export (QLoRA): the run on its weights, bit for bit, killed or not."""

from pathlib import Path

import pytest

from tests.support import runs
from tests.support.processes import ptm
from tests.support.runs import environment, finish

pytestmark = pytest.mark.slow
STEPS = 8
GROUP = 32


def words(folder: Path, base: Path, text: Path, **changes) -> list[str]:
    given = {
        "mode": "sft",
        "adapter.kind": "lora",
        "adapter.targets": "[q,v,experts]",
        "engine.zero": 3,
        "train.init_from": base,
        "train.lr": "1e-2",
        "train.schedule": "constant",
        "train.steps": STEPS,
        "train.seq_len": 64,
        "checkpoint.interval": 4,
        "eval.interval": 4,
        "sft.task_rows": 200,
        "sft.tasks": "[add,larger,first]",
        "sft.answers": 8,
        "sft.answer_tokens": 8,
    }
    return runs.words(folder, text, **given | changes)


@pytest.fixture(scope="module")
def export(base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(base, tmp_path_factory.mktemp("export") / "int4", cache, "bits=4")


def make_export(base: Path, out: Path, cache: Path, *how: str) -> Path:
    given = [f"run={base}", f"out={out}", f"group={GROUP}", "rows=4", *how]
    done = ptm("export", *given, cwd=base.parent, env=environment(cache))
    assert done.code == 0, done.err
    return out


def test_codes_train_as_their_weights_do_and_resume(
    export: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    codes, weights, again = (tmp_path / name for name in ("codes", "weights", "again"))
    int4 = {"adapter.base": "int4"}
    shown = finish(runs.launch(2, words(codes, export, text, **int4), cache))
    assert "experts as int4" in shown
    finish(runs.launch(2, words(weights, export, text), cache))
    log = runs.log(codes)
    assert log[-1]["loss"] < log[0]["loss"]
    assert log == runs.log(weights)
    assert runs.digests(codes, STEPS) == runs.digests(weights, STEPS)
    for steps in (4, STEPS):
        finish(runs.launch(2, words(again, export, text, **int4, train__steps=steps), cache))
    assert runs.log(again) == log and runs.digests(again, STEPS) == runs.digests(codes, STEPS)

    disk = tmp_path / "disk"
    (tmp_path / "pages").mkdir()
    paged = {"engine.ssd_path": tmp_path / "pages", "checkpoint.interval": 0, **int4}
    for steps in (4, STEPS):
        shown = finish(
            runs.launch(2, words(disk, export, text, **paged, train__steps=steps), cache)
        )
    assert "resuming after step 4 from the pages in" in shown and "starting from" not in shown
    assert runs.log(disk) == log

    found = {}
    for run in (codes, weights):
        done = ptm("eval", f"run={run}", "rows=4", cwd=tmp_path, env=environment(cache))
        assert done.code == 0, done.err
        found[run] = done.out
    assert found[codes].replace(str(codes), "") == found[weights].replace(str(weights), "")


def test_other_exports_are_one_line_before_a_run_folder(
    base: Path, export: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    uneven = make_export(base, tmp_path / "uneven", cache, "bits=4", "symmetric=false")
    told = {
        (base, "int4"): f"adapter.base=int4: needs an export, and {base} is none; make one with "
        "`ptm export RUN bits=4` and name its folder in train.init_from",
        (export, "int8"): "adapter.base=int8: is another grid than the int4 of "
        "model.layers.0.mlp.experts.0.w1",
        (uneven, "int4"): "adapter.base=int4: cannot be held, as "
        "model.layers.0.mlp.experts.0.w1 has zero points; make one with "
        "`ptm export RUN bits=4 symmetric=true`",
        (tmp_path / "none", "int8"): f"train.init_from={tmp_path}/none: is not there, and "
        "fine-tuning starts from it; make one with `ptm export RUN bits=8`",
    }
    for (folder, kind), rule in told.items():
        run = tmp_path / "run"
        done = runs.launch(0, words(run, folder, text, **{"adapter.base": kind}), cache)
        last = done.stderr.splitlines()[-1]
        assert last.startswith(rule), done.stderr[-2000:]
        assert done.returncode == (2 if folder.exists() else 4)
        assert len(done.stderr.splitlines()) == 1 and not run.exists()
