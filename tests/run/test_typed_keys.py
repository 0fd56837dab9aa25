"""Errors name the key that was typed, and what cannot be written is refused before the work."""

from pathlib import Path

import pytest
import torch.distributed as dist

from ptm.cli import run
from ptm.common.errors import DataError, as_typed


def told(words: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run([str(word) for word in words])
    if dist.is_initialized():  # a process that fails leaves that to its end
        dist.destroy_process_group()
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["eval", "gone"], "run"),
        (["generate", "gone"], "run"),
        (["export", "gone"], "run"),
        (["export", "verify", "a", "gone"], "run"),
        (["convert", "gone", "out"], "source"),
        (["bench", "decode", "gone", "exports=[a]"], "run"),
    ],
)
def test_a_folder_that_is_no_model(
    words: list[object], key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, err = told(words, capsys)
    assert code == 4 and err.startswith(f"{key}=gone: has no manifest.json, checkpoints, ")
    assert err.endswith("; name a run, checkpoint or model\n") and err.count("\n") == 1


def test_keys_of_the_job_and_of_the_run(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, base: Path
) -> None:
    code, err = told(["eval", base, "source=gone"], capsys)
    assert code == 4 and err.startswith("source=gone: does not exist; ")
    code, err = told(["eval", base, "seq_len=1000000"], capsys)
    assert code == 4 and err.splitlines()[-1].startswith("seq_len=1000000: ")
    assert "or set seq_len to" in err and "train.seq_len" not in err
    assert "seq_len=1000000: passes max_position_embeddings=" in caplog.text
    caplog.clear()
    assert told(["eval", base, "rows=2"], capsys)[0] == 0 and "passes" not in caplog.text
    code, err = told(["export", base, "group=32", "source=gone"], capsys)
    assert code == 4 and err.splitlines()[-1].startswith("source=gone: does not exist; ")
    assert not (base / "export").exists() or not list((base / "export").iterdir())


def test_only_the_key_and_dotted_names_are_changed() -> None:
    with (
        pytest.raises(DataError, match="^run=a: no folder, text=b; give source$"),
        as_typed({"folder": "run", "data.source": "source"}),
    ):
        raise DataError("folder=a: no folder, text=b; give data.source")


def test_a_place_that_cannot_be_written_is_refused_before_the_text_is_read(
    capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path
) -> None:
    code, err = told(["export", base, "group=32", "source=gone", "out=/proc/x"], capsys)
    assert code == 74 and err.startswith("out=/proc/x: cannot be written (")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    code, err = told(["export", base, "group=32", "source=gone", f"out={tmp_path}/taken"], capsys)
    assert code == 4 and err.startswith(f"out={tmp_path}/taken: is there already; ")
    code, err = told(["convert", base, "/proc/x", "to=hf"], capsys)
    assert code == 74 and err.startswith("out=/proc/x: cannot be written (")
