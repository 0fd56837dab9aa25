"""Every key with every kind of one-keystroke typo is refused, and the right key is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptm.cli import run
from ptm.common.errors import RecipeError
from ptm.common.near import distance
from ptm.common.parse import schema_of
from ptm.common.values import show
from ptm.recipe import NAMES, Recipe, load_recipe
from tests.support.edits import one_edit

SEED = 20261122
SCHEMA = schema_of(Recipe)
KNOWN = {*SCHEMA.settings, *SCHEMA.sections, *NAMES.aliases, *NAMES.absent}
SECTIONS = sorted({key.rpartition(".")[0] for key in SCHEMA.settings})


def typos(key: str) -> list[str]:
    found = {t for t in one_edit(key, SEED) if t not in KNOWN and t not in ("", key)}
    return sorted(found)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s or "top")
def test_typo_in_a_word(
    section: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for key in (k for k in SCHEMA.settings if k.rpartition(".")[0] == section):
        value = show(SCHEMA.settings[key].default)
        for typo in typos(key):
            code = run(["train", "recipe=m32", f"{typo}={value}"])
            out, err = capsys.readouterr()
            assert (code, out) == (2, ""), f"{typo} seed {SEED}"
            assert err.startswith(f"{typo}={value}: no such key"), err
            assert err.count("\n") == 1 and key in err.partition("; did you mean ")[2], err
    assert list(tmp_path.iterdir()) == []  # no run folder


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s or "top")
def test_typo_in_a_file(section: str, tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    for key in (k for k in SCHEMA.settings if k.rpartition(".")[0] == section):
        leaf, value = key.rpartition(".")[2], show(SCHEMA.settings[key].default)
        for typo in typos(leaf):
            full = f"{section}.{typo}" if section else typo
            if full in KNOWN or typo in ("base", "scales"):
                continue
            indent = f"{section}:\n  " if section else ""
            file.write_text(f"# a comment\n{indent}{typo}: {value}\n")
            with pytest.raises(RecipeError) as e:
                load_recipe([f"recipe={file}"])
            message = str(e.value)
            assert message.startswith(f"{full}="), message
            assert message.endswith(f"({file}:{3 if section else 2})"), message
            assert key in message.partition("; did you mean ")[2], f"{message} seed {SEED}"
            assert not section or f"in section {section}" in message


@pytest.mark.parametrize("section", [s for s in SECTIONS if s])
def test_typo_in_a_section(section: str, tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    leaf = next(iter(k for k in SCHEMA.settings if k.startswith(section + "."))).rpartition(".")[2]
    for typo in typos(section):
        file.write_text(f"{typo}:\n  {leaf}: 1\n")
        with pytest.raises(RecipeError) as e:
            load_recipe([f"recipe={file}"])
        assert str(e.value).startswith(f"{typo}={{{leaf}}}: no such key; did you mean "), e.value
        assert section in str(e.value).partition("; did you mean ")[2]
        assert f"({file}:1)" in str(e.value)


def test_the_typos_are_one_edit_away_and_of_every_kind() -> None:
    found = set(one_edit("train.lr", SEED))
    assert {"tran.lr", "train.rl", "trainlr"} <= found
    assert {len(t) for t in found} == {7, 8, 9}
    assert all(distance(t, "train.lr", 3) <= 1 for t in found)


@pytest.mark.parametrize(
    "words, remedy",
    [
        (["lr=1e-3"], "did you mean train.lr?"),
        (["interval=5"], "did you mean checkpoint.interval or eval.interval?"),
        (["learning_rte=1"], "did you mean learning_rate?"),
        (["training.lr=1"], "did you mean train.lr?"),
        (["xyzzy=1"], "--help lists every key"),
        (["gradient_accumulation_steps=4"], "it follows from train.batch_tokens"),
        (["train=5"], "set one of its keys: train.steps, train.lr"),
        (["train.lr"], "write train.lr=0.0001"),
        (["--dry_run"], "write dry_run=true"),
        (["--dry-run"], "did you mean dry_run?"),
        (["train.lr", "3e-4"], "write train.lr="),
        (["mini"], "write key=value"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(x),
)
def test_what_people_type(words: list[str], remedy: str) -> None:
    with pytest.raises(RecipeError) as e:
        load_recipe(words)
    assert remedy in str(e.value).partition("; ")[2]
