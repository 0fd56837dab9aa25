"""What a run settles on once and keeps."""

from pathlib import Path

from ptm import run_folder


def test_a_choice_of_the_plan_is_kept_for_the_same_ranks(tmp_path: Path) -> None:
    assert run_folder.settled(tmp_path, "zero-2", 1) == 1
    assert run_folder.settled(tmp_path, "zero-2", 3) == 1
    assert run_folder.settled(tmp_path, "zero-4", 3) == 3
    assert run_folder.settled(tmp_path / "absent", "zero-2", 2) == 2
    assert not (tmp_path / "absent").exists()


def test_a_run_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    name = run_folder.identify(tmp_path)
    assert name and run_folder.identify(tmp_path) == name
