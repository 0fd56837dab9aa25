"""Rotation deletes old checkpoints of this run, and nothing else whatever lies about."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ptm.checkpoint.config import CheckpointConfig
from ptm.checkpoint.load import newest_good
from ptm.checkpoint.rotate import best, rotate
from ptm.checkpoint.save import Saved, Saver
from ptm.checkpoint.verify import verify
from tests.support.state import whole

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(root: Path, step: int, *, is_best: bool = False, run_id: str = "run-1", **config) -> Saved:
    saving = Saver(root, CheckpointConfig(**{"keep": 99} | config), run_id=run_id)
    saved = saving.save(whole(step), step=step, meta={}, is_best=is_best, block=True)
    saving.close()
    assert saved is not None
    return saved


def steps(root: Path) -> list[int]:
    return sorted(int(name[5:]) for name in os.listdir(root) if name[5:].isdigit())


def test_the_newest_ones_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, is_best=step in (1, 3), keep=2)
    assert steps(tmp_path) == [3, 5, 6], "3 is the latest that was best"
    assert best(tmp_path, run_id="run-1") == tmp_path / "step-00000003"
    save(tmp_path, 7, keep=2, keep_best=False)
    assert steps(tmp_path) == [6, 7]


def test_a_save_says_what_it_deleted(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert save(tmp_path, 3, keep=1).notes == ["deleted step-00000001", "deleted step-00000002"]
    assert steps(tmp_path) == [3]


def test_what_is_not_this_runs_is_never_deleted(tmp_path: Path) -> None:
    save(tmp_path, 1, run_id="run-2")
    save(tmp_path, 2, run_id="run-2", is_best=True)
    own = [save(tmp_path, step).folder for step in (3, 4, 5)]
    shutil.copytree(own[0], tmp_path / "step-1000")  # a foreign name
    shutil.copytree(own[0], tmp_path / "step-00000000")  # ours by its manifest, but of step 3
    (tmp_path / "step-00000006").mkdir()  # no manifest
    shutil.copytree(own[1], tmp_path / "step-00000007")
    (tmp_path / "step-00000007" / "manifest.json").write_text("{}")  # unreadable
    (tmp_path / "step-00000008").symlink_to(own[0])
    gone = rotate(tmp_path, run_id="run-1", keep=1, keep_best=True, newest=own[2])
    assert gone == ["step-00000003", "step-00000004"]
    assert steps(tmp_path) == [0, 1, 2, 5, 6, 7, 8, 1000]


def test_the_one_just_saved_stays_even_if_later_steps_are_there(tmp_path: Path) -> None:
    for step in (7, 8, 9):
        save(tmp_path, step)
    saved = save(tmp_path, 5, keep=2)  # the run went back
    assert steps(tmp_path) == [5, 8, 9] and verify(saved.folder)


def test_damage_does_not_let_the_last_good_one_go(tmp_path: Path) -> None:
    folders = [save(tmp_path, step).folder for step in (1, 2, 3)]
    for folder in folders[1:]:
        path = next(folder.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    good = newest_good(tmp_path, repair=True)
    assert good is not None and good.folder == folders[0]
    save(tmp_path, 2, keep=1)  # after a resume from step 1
    assert steps(tmp_path) == [2]
    good = newest_good(tmp_path)
    assert good is not None and good.manifest.step == 2 and good.rejected == ()
    kept = sorted(name.split("-")[1] for name in os.listdir(tmp_path) if ".bad-" in name)
    assert kept == ["00000002.bad", "00000003.bad"]


def test_a_deletion_that_fails_is_told_and_does_not_fail_the_save(tmp_path: Path, monkeypatch):
    save(tmp_path, 1)

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    saved = save(tmp_path, 2, keep=1)
    assert "an old checkpoint stays" in saved.notes[0] and "Permission denied" in saved.notes[0]
    monkeypatch.undo()
    assert newest_good(tmp_path, repair=True) is not None
    assert os.listdir(tmp_path) == ["step-00000002"], "the rest of it goes at the next start"
