"""`--help` against the classes it is made from."""

from __future__ import annotations

import pytest

from ptm.cli import VERBS, load, run
from ptm.common.config import settings
from ptm.common.parse import schema_of
from ptm.common.values import describe, show
from ptm.recipe import NAMES, Recipe


def meaning_of(cls: type, key: str) -> str:
    """The string under a field, in the class that declares it."""
    *sections, name = key.split(".")
    for section in sections:
        cls = {s.name: s.type for s in settings(cls)}[section]
    found = [s.meaning for owner in cls.__mro__[:-1] for s in settings(owner) if s.name == name]
    return next((meaning for meaning in found if meaning), "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_with_type_default_range_and_meaning(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert run([verb, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"usage: ptm {verb}")
    text = " ".join(out.split())
    cls = load(VERBS[verb].config)
    schema = schema_of(cls)
    assert schema.settings
    for key, setting in schema.settings.items():
        entry = text.partition(f" {key}= ")[2]
        assert entry, f"{key} is missing"
        assert (
            entry.startswith(describe(setting.type).removesuffix(" or null")) or key in schema.prose
        )
        assert f"default {show(setting.default) or 'empty'}" in entry or "required" in entry
        assert setting.range is None or str(setting.range) in entry
        meaning = meaning_of(cls, key)
        assert len(meaning) > 5 and meaning in text, f"{key} has no string under it"
    # and the reverse: nothing that is not a key
    shown = {w.strip().partition("=")[0] for w in out.splitlines() if w[:2] == "  " and w[2] != " "}
    assert {w for w in shown if "," not in w and " " not in w} <= set(schema.settings)


def test_aliases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    run(["train", "-h"])
    text = " ".join(capsys.readouterr().out.split())
    for other, key in NAMES.aliases.items():
        assert f"{other} = {key}" in text


def test_all_sections_have_headings(capsys: pytest.CaptureFixture[str]) -> None:
    run(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for section in schema_of(Recipe).sections:
        assert f"{section}:" in lines
