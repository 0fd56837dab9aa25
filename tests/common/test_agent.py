"""torchrun as users see it: the rank's own line and exit code, and nothing of the agent's.

Real runs of torchrun over tests/support/failing_jobs.py; the choice between ranks is tested apart.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from ptm.common.agent import is_agent_of_ptm, of_failures, of_signal
from tests.support.processes import ROOT, Ended, Variables, run_process, variables

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture
def installed(tmp_path: Path) -> Variables:
    """Variables that make this checkout count as installed, with its entry points."""
    facts = tmp_path / "site" / "ptm-0.0.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: ptm\nVersion: 0.0.0\n")
    declared = (ROOT / "pyproject.toml").read_text()
    target = re.search(r'\[project.entry-points."torchrun.handlers"\]\nptm = "(.*)"', declared)
    assert target
    (facts / "entry_points.txt").write_text(f"[torchrun.handlers]\nptm = {target[1]}\n")
    path = f"{facts.parent}{os.pathsep}{ROOT}"
    return {"PYTHONPATH": path, "TMPDIR": str(tmp_path), "LOGLEVEL": None, "OMP_NUM_THREADS": None}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A job in a launch/ folder beside a ptm package, as the agent knows ours by its place."""
    root = tmp_path / "checkout"
    (root / "launch").mkdir(parents=True)
    (root / "ptm" / "common").mkdir(parents=True)
    (root / "ptm" / "common" / "agent.py").touch()
    text = (ROOT / "tests" / "support" / "failing_jobs.py").read_text()
    job = root / "launch" / "job.py"
    job.write_text(text)
    return job


def torchrun(*words: str | Path, cwd: Path, env: Variables) -> Ended:
    return run_process([*TORCHRUN, *words], cwd=cwd, env=env)


def test_a_wrong_word_is_printed_once(installed: Variables, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    ended = torchrun(ROOT / "launch/train.py", "train.lr=nan", cwd=here, env=installed)
    assert ended.code == 2 and ended.out == ""
    assert ended.err == "train.lr=nan: must be a finite number; give > 0 and <= 10\n"
    assert list(here.iterdir()) == []
    assert ended.wall_s < 20


@pytest.mark.parametrize(
    "job, code, message",
    [
        ("refused_on_rank_1", 4, r"\[1/2\] run=x: no checkpoint; name another\n"),
        ("bug_on_rank_1", 70, r"\[1/2\] error=KeyError\(.*\): .*; the full trace is in .*\n"),
        (
            "killed_on_rank_1",
            137,
            r"signal=SIGKILL: rank 1 on \S+ was killed, .*; .*resume=auto.*\n",
        ),
        ("diverged", 76, r"train.max_skipped=3: too many; lower train.lr\n"),
    ],
)
def test_the_rank_speaks_and_the_agent_is_silent(
    job: str, code: int, message: str, installed: Variables, script: Path, tmp_path: Path
) -> None:
    ended = torchrun(script, job, "model.scale=debug", cwd=tmp_path, env=installed)
    assert (ended.code, ended.out) == (code, "")
    assert re.fullmatch(message, ended.err), ended.err


@pytest.mark.parametrize(
    "job, number, code, message",
    [
        ("saves_when_told", signal.SIGTERM, 75, "run=x: saved after SIGTERM; start again\n"),
        ("saves_when_told", signal.SIGINT, 75, "run=x: saved after SIGINT; start again\n"),
        (
            "does_not_save",
            signal.SIGTERM,
            143,
            "signal=SIGTERM: ended without saving .*; the same command .*\n",
        ),
    ],
)
def test_a_signal_to_the_agent(
    job: str,
    number: int,
    code: int,
    message: str,
    installed: Variables,
    script: Path,
    tmp_path: Path,
) -> None:
    agent = subprocess.Popen(
        [*TORCHRUN, script, job, "model.scale=debug"],
        cwd=tmp_path,
        env=variables(installed),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert agent.stdout
        ready = sorted(agent.stdout.readline() for _ in range(2))
        assert ready == ["ready 0\n", "ready 1\n"]
        time.sleep(0.2)
        agent.send_signal(number)
        out, err = agent.communicate(timeout=40)
    finally:
        agent.kill()
    assert (agent.returncode, out) == (code, "")
    assert re.fullmatch(message, err), err


def test_other_jobs_are_left_alone(installed: Variables, script: Path, tmp_path: Path) -> None:
    other = tmp_path / "job.py"
    shutil.copy(script, other)
    ended = torchrun(other, "killed_on_rank_1", "model.scale=debug", cwd=tmp_path, env=installed)
    assert ended.code == 1
    assert "Traceback" in ended.err and "ChildFailedError" in ended.err and "OMP_NUM" in ended.err


def test_loglevel_brings_torchruns_log_back(
    installed: Variables, script: Path, tmp_path: Path
) -> None:
    env = {**installed, "LOGLEVEL": "WARNING"}
    ended = torchrun(script, "diverged", "model.scale=debug", cwd=tmp_path, env=env)
    assert ended.code == 76 and "failed (exitcode: 76)" in ended.err


@pytest.mark.parametrize(
    "words, expected",
    [
        ("torchrun --nproc-per-node 2 launch/train.py recipe=m32", True),
        ("torchrun --nnodes=2 --rdzv-endpoint h:1 {root}/launch/train.py", True),
        ("torchrun --nproc-per-node 2 -m ptm train recipe=m32", True),
        ("torchrun --no-python /bin/ptm train", True),
        ("torchrun -m ptm.cli train", True),
        ("torchrun other.py launch/train.py", False),
        ("torchrun launch/gone.py", False),
        ("torchrun -m other ptm", False),
        ("torchrun -m ptmx", False),
        ("torchrun --no-python other", False),
        ("torchrun tests/test_cli.py", False),
        ("launch/train.py recipe=m32", False),
        ("torchrun", False),
        ("", False),
    ],
)
def test_whose_job_it_is(words: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert is_agent_of_ptm(words.format(root=ROOT).split()) is expected


class Failure(NamedTuple):
    exitcode: int
    timestamp: int


@pytest.mark.parametrize(
    "failures, code, named",
    [
        ({0: (2, 5), 1: (-15, 5)}, 2, ""),
        ({0: (-15, 5), 1: (2, 5)}, 2, ""),
        ({0: (70, 5), 1: (-9, 5)}, 137, "rank 1"),  # rank 0 lost its peer within the second
        ({0: (70, 5), 1: (-9, 9)}, 70, ""),
        ({0: (70, 5), 1: (4, 5)}, 4, ""),
        ({0: (70, 5), 1: (4, 6)}, 4, ""),
        ({3: (-11, 5), 2: (-15, 4)}, 139, "rank 3"),
        ({0: (-15, 5), 1: (-15, 5)}, 143, "rank 0"),
        ({0: (75, 5), 1: (75, 5)}, 75, ""),
        ({0: (75, 5), 1: (4, 5)}, 4, ""),  # rank 0 was ended at its start, as rank 1 had failed
        ({0: (70, 5), 1: (75, 5)}, 75, ""),
    ],
)
def test_the_first_cause_decides(
    failures: dict[int, tuple[int, int]], code: int, named: str
) -> None:
    found, message = of_failures({rank: Failure(*f) for rank, f in failures.items()})
    assert found == code and named in message and bool(named) == bool(message)


@pytest.mark.parametrize(
    "number, codes, expected",
    [
        (15, [75, 75], 75),
        (15, [75, -15], 75),
        (15, [75, 74], 74),
        (15, [75, -9], 137),
        (15, [-15, -15], 143),
        (2, [-2, -2], 130),
        (2, [130, 130], 130),
        (15, [0, 0], 0),
        (15, [0, -15], 143),
        (15, [], 143),
    ],
)
def test_what_ranks_leave_with_after_a_signal(number: int, codes: list[int], expected: int) -> None:
    assert of_signal(number, codes)[0] == expected
