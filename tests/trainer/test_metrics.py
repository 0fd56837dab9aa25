"""The log of a run: what is kept on resume, what survives a kill, and that wandb never matters."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ptm.common.errors import StorageError
from ptm.mesh.collectives import Entry
from ptm.trainer.console import PlainConsole, heat_rows, step_line
from ptm.trainer.metrics import LogConfig, Metrics, ProgressKind, WandbMode, expert_load
from ptm.trainer.tracker import WandbTracker, flat, wandb_mode

QUIET = LogConfig(wandb=WandbMode.off, progress=ProgressKind.off)
RECORD = {
    "loss": 5.12341,
    "grad_norm": 0.412,
    "lr": 3e-4,
    "tokens_per_s": 8412.3,
    "mfu": 0.212,
    "memory_bytes": int(1.3 * 2**30),
    "expert_load": expert_load([[3, 1, 0, 0], [1, 1, 1, 1]]),
}


def write(run_dir: Path, steps: range, *, start_step: int) -> None:
    with Metrics(run_dir, QUIET, total_steps=100, start_step=start_step) as metrics:
        for step in steps:
            metrics.log(step, {"loss": 1 / step, "expert_load": RECORD["expert_load"]})


def test_resumed_log_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(1, 11), start_step=0)
    write(tmp_path / "cut", range(1, 9), start_step=0)
    write(tmp_path / "cut", range(6, 11), start_step=5)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (
        tmp_path / "whole/metrics.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("torn", [b'{"step":3,"loss":0.', b"\0" * 40, b'{"step":3}x\n', b"[3]\n"])
def test_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    write(tmp_path, range(1, 3), start_step=0)
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + torn)
    write(tmp_path, range(0), start_step=5)
    assert path.read_bytes() == good


def test_events_keep_their_past_but_not_a_torn_line(tmp_path: Path) -> None:
    for start in (0, 5):
        with Metrics(tmp_path, QUIET, total_steps=9, start_step=start) as metrics:
            metrics.event("start", step=start)
        with (tmp_path / "events.jsonl").open("ab") as file:
            file.write(b'{"time":')
    with Metrics(tmp_path, QUIET, total_steps=9, start_step=5):
        pass
    events = [json.loads(text) for text in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["step"]) for event in events] == [("start", 0), ("start", 5)]


def test_kill_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import sys; from ptm.trainer.metrics import *\n"
        "q = LogConfig(wandb=WandbMode.off, progress=ProgressKind.off)\n"
        "m = Metrics(sys.argv[1], q, total_steps=10**9)\n"
        "for i in range(1, 10**9):\n"
        "    m.log(i, {'x': 'y' * 5000}); i == 50 and print('go', flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"go\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    Metrics(tmp_path, QUIET, total_steps=1, start_step=40).close()
    steps = [json.loads(t)["step"] for t in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


def test_not_a_number_is_null_and_arrays_are_lists(tmp_path: Path) -> None:
    import torch

    with Metrics(tmp_path, QUIET, total_steps=1) as metrics:
        metrics.log(1, {"loss": math.nan, "x": torch.tensor(2), "y": torch.ones(2), "p": Path("a")})
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record == {"step": 1, "loss": None, "x": 2, "y": [1.0, 1.0], "p": "a"}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Metrics(tmp_path / "run", QUIET, total_steps=1, is_main=False) as metrics:
        metrics.log(1, RECORD)
        metrics.event("start")
    assert not (tmp_path / "run").exists()


def test_unwritable_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="run.dir=.*must be writable"):
        Metrics(tmp_path / "file", QUIET, total_steps=1)


def test_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    metrics = Metrics(tmp_path, QUIET, total_steps=1)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, metrics._steps._file)
    os.close(full)
    with pytest.raises(StorageError, match="No space left"):
        metrics.log(1, RECORD)


@pytest.mark.parametrize(
    "counts, entropy, max_over_mean, dead",
    [
        ([5, 5, 5, 5], 1.0, 1.0, 0),
        ([9, 0, 0, 0], 0.0, 4.0, 3),
        ([0, 0, 0, 0], 0.0, 0.0, 4),
        ([2, 2, 0, 0], 0.5, 2.0, 2),
        ([7], 1.0, 1.0, 0),
    ],
)
def test_expert_load(counts: list[int], entropy: float, max_over_mean: float, dead: int) -> None:
    load = expert_load([counts])["0"]
    assert (load["entropy"], load["max_over_mean"], load["dead"]) == (entropy, max_over_mean, dead)
    assert sum(load["share"]) == pytest.approx(1.0 if sum(counts) else 0.0)


def test_expert_load_of_ranks() -> None:
    load = expert_load([[3, 1, 0, 0], [0, 0, 0, 0], [1, 2, 2, 1]], ep=2)
    assert [load[layer]["rank_share"] for layer in load] == [[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]]
    assert [load[layer]["rank_max_over_mean"] for layer in load] == [2.0, 0.0, 1.0]
    assert "rank_share" not in expert_load([[3, 1, 0, 0]])["0"]


def test_step_line() -> None:
    assert step_line(120, 2000, RECORD, "00:12:03") == (
        "step 120/2000 loss 5.1234 gnorm 0.41 lr 3.0e-04 tok/s 8,412 mfu 21.2% mem 1.3G "
        "exp[max 3.0x dead 2] eta 00:12:03"
    )


def test_step_line_shows_pages_that_move_and_lateness() -> None:
    moves = {"step_s": 0.5, "pages": {"reads": 20, "writes": 5, "hits": 9}}
    assert "pages/s[read 40 write 10] eta" in step_line(1, 2, moves, "00:00:01")
    late = {"step_s": 0.5, "updates": {"late_steps_mean": 0, "late_steps_most": 0}}
    assert step_line(1, 2, late, "x") == "step 1/2 late[mean 0.00 most 0] eta x"
    still = {"step_s": 0.5, "pages": {"hits": 9}, "updates": {"waited_s": 0.1}}
    assert step_line(1, 2, still, "x") == "step 1/2 eta x"


COSTS = {"gather": Entry(10, 3 * 2**20, 2 * 2**20, 1.25), "all_reduce": Entry(4, 0, 0, 0.5)}


@pytest.mark.parametrize("kind", [ProgressKind.plain, ProgressKind.rich])
def test_ledger_is_an_event_and_a_table(
    tmp_path: Path, kind: ProgressKind, capsys: pytest.CaptureFixture
) -> None:
    log = LogConfig(wandb=WandbMode.off, progress=kind)
    with Metrics(tmp_path, log, total_steps=9, start_step=5) as metrics:
        metrics.ledger(9, COSTS)
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["kind"], event["step"], event["steps"]) == ("ledger", 9, 4)
    assert event["collectives"]["gather"] == {
        "calls": 10,
        "sent_bytes": 3 * 2**20,
        "bound_bytes": 2 * 2**20,
        "waited_s": 1.25,
    }
    rows = [" ".join(text.split()) for text in capsys.readouterr().out.splitlines() if text.strip()]
    assert "gather 10 3.00 MiB 2.00 MiB 1.500 1.25 s" in rows
    assert "all_reduce 4 0 B 0 B - 0.50 s" in rows
    assert "all 14 3.00 MiB 2.00 MiB 1.500 1.75 s" in rows


def test_nothing_sent_makes_no_ledger(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = LogConfig(wandb=WandbMode.off, progress=ProgressKind.plain)
    with Metrics(tmp_path, log, total_steps=9) as metrics:
        metrics.ledger(9, {})
    assert (tmp_path / "events.jsonl").read_text() == "" == capsys.readouterr().out


def test_plain_console_is_sparse_but_keeps_notable_steps(capsys: pytest.CaptureFixture) -> None:
    console = PlainConsole(9, every_s=3600.0)
    for step in range(1, 10):
        skipped = 1 if step >= 6 else 0  # a count over the run, as the loop gives it
        extra = {"eval_loss": 4.0} if step == 4 else {}
        console.step(step, {"loss": None if step == 6 else 1.0, "skipped": skipped, **extra})
    lines = capsys.readouterr().out.splitlines()
    assert [text.split()[1] for text in lines] == ["1/9", "4/9", "6/9", "9/9"]
    assert "loss nan" in lines[2] and "skipped 1" in lines[2]


def test_rich_console_shows_steps_and_events(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = LogConfig(wandb=WandbMode.off, progress=ProgressKind.rich)
    with Metrics(tmp_path, log, total_steps=2) as metrics:
        metrics.event("checkpoint", step=1, path="[bold]x")
        metrics.log(1, RECORD)
    shown = capsys.readouterr().out
    assert "checkpoint step=1 path=[bold]x" in shown and "step 1/2 loss 5.1234" in shown


def test_heat_map_shows_the_least_even_layers() -> None:
    counts = [[1] * 4] * 20 + [[4, 0, 0, 0]]
    rows = [row.plain for row in heat_rows({"expert_load": expert_load(counts)})]
    assert len(rows) == 8 and rows[-1].startswith("layer  20 █···")


def test_wandb_offline_copies_and_continues(tmp_path: Path) -> None:
    warnings: list[str] = []
    for _ in range(2):
        tracker = WandbTracker(
            "offline", project="p", run_dir=tmp_path, run_name="n", header={}, warn=warnings.append
        )
        tracker.log(1, RECORD)
        tracker.close()
    run_id = (tmp_path / "wandb/run_id").read_text()
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert warnings == [] and {file.name for file in files} == {f"run-{run_id}.wandb"}


def test_wandb_failure_warns_once_and_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise RuntimeError("no network\nlong trace")

    monkeypatch.setattr(wandb, "init", fail)
    warnings: list[str] = []
    tracker = WandbTracker(
        "online", project="p", run_dir=tmp_path, run_name="n", header={}, warn=warnings.append
    )
    tracker._thread.join(30)
    tracker.log(1, RECORD)
    tracker.close()
    assert len(warnings) == 1 and "no network; metrics.jsonl has everything" in warnings[0]


@pytest.mark.parametrize(
    "wanted, variable, has_key, mode",
    [
        ("auto", None, False, "offline"),
        ("auto", None, True, "online"),
        ("auto", "disabled", True, "off"),
        ("auto", "offline", True, "offline"),
        ("online", None, False, "offline"),
        ("online", None, True, "online"),
        ("off", None, True, "off"),
        ("offline", None, True, "offline"),
    ],
)
def test_wandb_mode(
    wanted: str, variable: str | None, has_key: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    if has_key:
        monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode(wanted, lambda _: None) == mode


def test_wandb_gets_numbers_only() -> None:
    numbers = flat(
        {
            "step": 3,
            "loss": 1.0,
            "note": "x",
            "gone": None,
            **RECORD,
            "pages": {"reads": 7, "x": "y"},
        }
    )
    assert numbers["pages/reads"] == 7 and "pages/x" not in numbers
    assert numbers["expert_dead/layer_0"] == 2 and "note" not in numbers and "gone" not in numbers
    assert all(isinstance(value, (int, float)) for value in numbers.values())


def test_the_log_imports_without_torch() -> None:
    code = "import sys, ptm.trainer.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
