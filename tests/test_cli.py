"""The door: verbs, exit codes, and one line for everything that goes wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ptm.cli import VERBS, run
from ptm.common import incident
from tests.support.processes import ROOT, ptm, run_process

LAUNCH = sorted(p.stem for p in (ROOT / "launch").glob("*.py"))
DEBUG = ["train", "recipe=m32", "model.scale=debug"]


@pytest.fixture
def job(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ptm train` does this job of tests/support/failing_jobs.py instead."""
    verb = VERBS["train"]._replace(job=f"tests.support.failing_jobs:{request.param}")
    monkeypatch.setitem(VERBS, "train", verb)


def test_verbs_are_the_launch_scripts() -> None:
    assert sorted(VERBS) == LAUNCH


@pytest.mark.parametrize("name", LAUNCH)
def test_launch_scripts_run_their_verb_from_any_folder(name: str, tmp_path: Path) -> None:
    script = ROOT / "launch" / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 12
    ended = run_process([sys.executable, script, "--help"], cwd=tmp_path, env={"PYTHONPATH": ""})
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"usage: ptm {name}")
    ended = run_process([sys.executable, script, "nonsense=1"], cwd=tmp_path)
    assert ended.code == 2 and re.fullmatch(r"nonsense=1: no such key; .*\n", ended.err)
    assert list(tmp_path.iterdir()) == []


def test_what_people_ask_for_and_is_no_key_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "runs/x", "out", "merge=true"]) == 2
    told = "merge=true: is not a setting here; leave it out: an adapter is merged, and"
    assert capsys.readouterr().err.startswith(told)


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert run(words) == 0
        out = capsys.readouterr().out
        assert all(f"  {name}" in out for name in VERBS) and "m32" in out
    assert run(["--version"]) == 0
    assert re.fullmatch(r"ptm \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "word, guess",
    [("trian", "ptm train"), ("recipe=m32", "ptm train recipe=m32"), ("xyzzy", "ptm --help")],
)
def test_unknown_verbs(word: str, guess: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([word]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"verb={word}: no such verb, there are train, plan")
    assert err.endswith(f"did you mean {guess}?\n") and err.count("\n") == 1


@pytest.mark.parametrize(
    "job, code, message",
    [
        ("fine", 0, ""),
        ("code_9", 9, ""),
        ("refused", 4, "run=x: no checkpoint; name another"),
        ("diverged", 76, "train.max_skipped=3: too many; lower train.lr"),
        ("saved", 75, "run=x: saved at step 3; start it again"),
        ("memory", 71, "memory=: out of memory; lower train.micro_batch_size.*"),
        (
            "torch_memory",
            71,
            "memory=.*can't allocate memory.*: out of memory; .*recompute=block.*",
        ),
        ("disk_full", 74, r"file=/run/x: cannot be read or written \(No space .*\); .*"),
        ("disk_full_below", 74, "disk=could not write: is full; make space, then resume=auto"),
        ("not_allowed", 74, r"file=/etc/x: cannot be read or written \(Permission .*\); .*"),
        ("interrupted", 130, "signal=SIGINT: interrupted, .*; .*"),
        ("not_installed", 70, "module=a_module_that_nobody_has: is not installed; pip install .*"),
    ],
    indirect=["job"],
)
def test_exit_codes(job: None, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(DEBUG) == code
    err = capsys.readouterr().err
    assert re.fullmatch(message + ("\n" if message else ""), err), err


@pytest.mark.parametrize("job", ["bug"], indirect=True)
@pytest.mark.parametrize("has_run", [True, False], ids=["run folder", "no run folder"])
def test_a_bug_leaves_its_trace_in_a_file(
    job: None,
    has_run: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_dir = tmp_path / "run"
    if has_run:
        run_dir.mkdir()
    incident.set_run_dir(run_dir)
    try:
        assert run(DEBUG) == 70
    finally:
        incident.set_run_dir(None)
    err = capsys.readouterr().err
    found = re.fullmatch(r"error=KeyError\(.*\): ptm did not expect this; .* in (.*)\n", err)
    assert found, err
    trace = Path(found[1])
    assert trace.parent == (run_dir / "incidents" if has_run else tmp_path)
    assert "raise KeyError" in trace.read_text() and trace.stat().st_mode & 0o777 == 0o600
    assert run_dir.exists() is has_run


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    for words in (["train", "--help"], ["fails"]):
        code = "import sys; from ptm.cli import main; main(sys.argv[1:])"
        if words == ["fails"]:
            code = "from tests.support.failing_jobs import *; from ptm.cli import VERBS, main;"
            code += "VERBS['train'] = VERBS['train']._replace(job='tests.support.failing_jobs:"
            code += "writes_much'); main(['train', 'model.scale=debug'])"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE


def test_a_wrong_word_is_answered_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    ended = ptm("train", "recipe=m32", "train.lr=nan", cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "train.lr=nan: must be a finite number; give > 0 and <= 10\n"
    assert ended.wall_s < 1.0
    assert list(tmp_path.iterdir()) == []


def test_the_process_ends_though_a_thread_does_not(tmp_path: Path) -> None:
    code = (
        "import threading, time, ptm.cli as c; c.SHUTDOWN_S = 0.2;"
        "threading.Thread(target=time.sleep, args=[60]).start(); c.main(['trian'])"
    )
    ended = run_process([sys.executable, "-c", code], cwd=tmp_path)
    assert ended.code == 2 and ended.wall_s < 10


def test_other_ranks_are_silent_about_the_same_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a rank of another node than rank 0's: nobody ends it, so it does not wait
    for name, value in {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert run(["train", "train.lr=nan"]) == 2
    assert run(["train", "--help"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("job", ["refused", "bug"], indirect=True)
def test_other_ranks_name_themselves_for_errors_of_their_own(
    job: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert run(DEBUG) in (4, 70)
    assert capsys.readouterr().err.startswith("[3/4] ")


def test_the_temporary_folder_is_not_littered(tmp_path: Path) -> None:
    ended = ptm("plan", "recipe=m33", cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    assert ended.code == 2 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["PTM_BACKEND", "PTM_CPU_ISA", "PTM_CUDA_KERNELS"])
def test_a_switch_of_the_kernels_is_refused_before_anything_is_opened_or_shown(
    name: str, tmp_path: Path
) -> None:
    ended = ptm("generate", "gone", "prompt=shown", cwd=tmp_path, env={name: "fast"})
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(rf"{name}=fast: [^\n]*; unset it for [^\n]*\n", ended.err)


@pytest.mark.parametrize("words", [["eval", "gone"], ["export", "verify", "gone", "gone"]])
def test_a_file_for_numbers_is_tried_before_anything_is_opened(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, f"json={tmp_path}/no/x.json"]) == 74
    assert capsys.readouterr().err.startswith(f"json={tmp_path}/no/x.json: cannot be written")
    assert run([*words, f"json={tmp_path}/x.json"]) == 4  # the folder is not there
    assert not list(tmp_path.iterdir())
