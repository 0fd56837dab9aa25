"""What a run settles on once and keeps."""

from pathlib import Path

import pytest

from ptm import run_folder
from ptm.cli import run
from ptm.common.errors import RecipeError
from ptm.recipe import load_recipe
from tests.support import runs


def test_a_choice_of_the_plan_is_kept_for_the_same_ranks(tmp_path: Path) -> None:
    assert run_folder.settled(tmp_path, "zero-2", lambda: 1) == 1
    assert run_folder.settled(tmp_path, "zero-2", lambda: 3) == 1
    assert run_folder.settled(tmp_path, "zero-4", lambda: 3) == 3
    assert run_folder.settled(tmp_path / "absent", "zero-2", lambda: 2) == 2
    assert not (tmp_path / "absent").exists()


def test_a_run_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    name = run_folder.identify(tmp_path)
    assert name and run_folder.identify(tmp_path) == name


@pytest.mark.parametrize(
    "words, key",
    [
        (["engine.kind=fsdp", "engine.update=bounded"], "engine.update=bounded"),
        (["engine.kind=fsdp", "engine.chunks=4"], "engine.chunks=4"),
        (["engine.kind=deepspeed", "engine.moments=int8"], "engine.moments=int8"),
        (["engine.kind=deepspeed", "engine.page_mib=2"], "engine.page_mib=2"),
        (["engine.journal_every=3"], "engine.journal_every=3"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(words: list[str], key: str) -> None:
    with pytest.raises(RecipeError, match=key):
        load_recipe(["recipe=m32", *words])


@pytest.mark.parametrize("words", [[], ["engine.kind=fsdp"]], ids=["no disk", "fsdp"])
def test_a_start_that_would_forget_steps_on_a_disk_is_refused(
    words: list[str], tmp_path: Path, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTM_CACHE", str(cache))
    (tmp_path / "ssd").mkdir()
    fixed = {"checkpoint.interval": 0, "engine.zero": 3, "engine.page_mib": 1}
    disk = [f"engine.ssd_path={tmp_path / 'ssd'}"]
    folder = tmp_path / "run"
    train = ["train", *runs.words(folder, text, **fixed, train__steps=3)]
    assert run([*train, *disk]) == 0
    steps = (folder / "metrics.jsonl").read_text()

    again = {"checkpoint.interval": 1, "engine.zero": 3, "train__steps": 5}
    other = ["train", *runs.words(folder, text, **again)]
    assert run([*other, *words]) == 4
    assert (folder / "metrics.jsonl").read_text() == steps

    assert run([*other, "engine.page_mib=1", *disk]) == 0
    assert (folder / "metrics.jsonl").read_text().startswith(steps)
    assert run([*other, *words, "train.steps=6"]) == 0
