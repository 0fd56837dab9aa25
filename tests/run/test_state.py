"""N steps equal k steps and N - k more, and do not if any part of the state is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ptm.parts
from ptm.cli import run
from tests.support import runs

N = 6


@pytest.fixture
def words(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.setenv("PTM_CACHE", str(cache))

    def make(folder: Path, **changes: Any) -> list[str]:
        fixed = {
            "train.schedule": "constant",  # a cosine depends on train.steps
            "train.warmup_steps": 1,
            "model.attention_dropout": 0.1,
            "train.batch_tokens": 256,
            "checkpoint.interval": 1,
            "checkpoint.keep": 1,
            "checkpoint.keep_best": "false",
            "eval.interval": 0,
        }
        return ["train", *runs.words(folder, text, **fixed, **changes)]

    return make


@pytest.fixture
def whole(words: Callable[..., list[str]], tmp_path: Path) -> dict[str, Any]:
    assert run(words(tmp_path / "whole", train__steps=N)) == 0
    return runs.digests(tmp_path / "whole", N)


def test_stopped_after_every_step(
    words: Callable[..., list[str]], whole: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    for k in range(1, N + 1):
        assert run(words(folder, train__steps=k)) == 0
    assert runs.digests(folder, N) == whole


def test_dropout_was_on(
    words: Callable[..., list[str]], whole: dict[str, Any], tmp_path: Path
) -> None:
    assert run(words(tmp_path / "dry", train__steps=N, model__attention_dropout=0)) == 0
    assert runs.digests(tmp_path / "dry", N) != whole


@pytest.mark.parametrize(
    "lost", ["model.", "optim.exp_avg.", "optim.exp_avg_sq.", "updates", "step"]
)
def test_a_lost_part_of_the_state_shows(
    lost: str,
    words: Callable[..., list[str]],
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The negative control: a load that loses one kind of state must end elsewhere."""
    assert run(words(tmp_path / "run", train__steps=3)) == 0
    real = ptm.parts.load

    def lossy(good: Any, state: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        meta = real(good, state, **kwargs)
        for name, rows in state.items():
            if name.startswith(lost):
                rows.write(rows.read() * 0.5)
        if lost in meta["train"]:
            meta["train"][lost] -= 1
        return meta

    monkeypatch.setattr(ptm.parts, "load", lossy)
    assert run(words(tmp_path / "run", train__steps=N)) == 0
    assert runs.digests(tmp_path / "run", N) != whole
