"""The parser on small classes of its own: where values come from, and what errors say."""

from __future__ import annotations

from dataclasses import field

import pytest

from ptm.common.config import Choice, config, ranged
from ptm.common.errors import RecipeError, line
from ptm.common.parse import Names, schema_of
from ptm.common.strict_yaml import Mapping, read_text


class Switch(Choice):
    off = "off"
    none = "none"


@config
class Part:
    steps: int = ranged(10, least=1)
    rate: float = ranged(0.5, above=0.0)
    switch: Switch = Switch.off
    weights: tuple[float, ...] = ranged((), above=0.0)
    places: tuple[str, ...] = ("here",)
    limit: int | None = ranged(None, least=0)
    choice: Switch | None = None

    def check(self) -> None:
        if self.steps == 13:
            raise RecipeError(line("steps", self.steps, "brings bad luck", "take 12"))
        if self.steps == 14:
            raise RecipeError(line("part.steps", self.steps, "is odd", "take 12"))


@config
class Whole:
    run: str
    text: str = field(default="", metadata={"prose": True})
    loud: bool = False
    part: Part = field(default_factory=Part)


SCHEMA = schema_of(Whole)


def words(*given: str, positionals: tuple[str, ...] = ("run",)) -> Whole:
    return SCHEMA.build(SCHEMA.words(given, positionals=positionals))


def file(text: str) -> Whole:
    tree = read_text(text, "a.yaml")
    assert isinstance(tree, Mapping)
    return SCHEMA.build({**SCHEMA.file(tree, "a.yaml"), **SCHEMA.words(["run=x"])})


@pytest.mark.parametrize(
    "word, key, value",
    [
        ("part.steps=1_000", "part.steps", 1000),
        ("--part.steps=+7", "part.steps", 7),
        ("part.rate=3e-4", "part.rate", 3e-4),
        ("part.rate=.5", "part.rate", 0.5),
        ("part.rate=2", "part.rate", 2.0),
        ("part.switch=none", "part.switch", Switch.none),
        ("part.choice=none", "part.choice", Switch.none),
        ("part.choice=null", "part.choice", None),
        ("part.limit=None", "part.limit", None),
        ("part.weights=1,.5", "part.weights", (1.0, 0.5)),
        ("part.weights=[1, 2e0]", "part.weights", (1.0, 2.0)),
        ("part.weights=[]", "part.weights", ()),
        ("part.places=/a/[bc]*.txt,/d", "part.places", ("/a/[bc]*.txt", "/d")),
        ("part.places=['a,b', c]", "part.places", ("a,b", "c")),
        ("loud=true", "loud", True),
        ("loud=False", "loud", False),
        ("text=", "text", ""),
        ("text=${x} [a]\n=", "text", "${x} [a]\n="),
        ("text=null", "text", "null"),
    ],
)
def test_words(word: str, key: str, value: object) -> None:
    found = SCHEMA.flatten(words("here", word))[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("part: {steps: 1_000}", "part.steps", 1000),
        ("part: {switch: off}", "part.switch", Switch.off),
        ("part: {switch: 'off'}", "part.switch", Switch.off),
        ("part: {limit: ~}", "part.limit", None),
        ("part:\n  limit:", "part.limit", None),
        ("part: {places: one}", "part.places", ("one",)),
        ("part: {places: 'a,b'}", "part.places", ("a,b",)),
        ("part: {places: ['1', b]}", "part.places", ("1", "b")),
        ("part.rate: 1e-3", "part.rate", 1e-3),
        ("text: |\n  a\n  b\n", "text", "a\nb\n"),
    ],
)
def test_files(text: str, key: str, value: object) -> None:
    found = SCHEMA.flatten(file(text))[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, rule",
    [
        ("part: {steps: '5'}", "part.steps=5: must be int, not text; remove the quotes"),
        ("part: {steps: 1.0}", "must be an integer; write 1"),
        ("part: {places: [1]}", "YAML may read it as int; put it in quotes"),
        ("part: {places: [no]}", "YAML may read it as bool"),
        ("part: {places: 2026-11-22}", "YAML may read it as timestamp"),
        ("part: {places: 1:30}", "YAML may read it as int"),
        ("part: {weights: [[1]]}", "must be float, not a list"),
        ("part: {switch: [off]}", "must be off|none, not a list"),
        ("loud: yes", "must be true or false; write true"),
        ("loud: 0", "must be true or false"),
        ("part: {steps: 13}", "part.steps=13: brings bad luck; take 12 (a.yaml:1)"),
        ("part: {steps: 14}", "part.steps=14: is odd; take 12 (a.yaml:1)"),
        ("part: {steps: 0}", "part.steps=0: must be >= 1; change it"),
    ],
)
def test_files_refused(text: str, rule: str) -> None:
    with pytest.raises(RecipeError) as e:
        file(text)
    assert rule in str(e.value) and str(e.value).endswith("(a.yaml:1)")


def test_a_value_that_a_word_replaces_is_checked_all_the_same() -> None:
    tree = read_text("part: {steps: -1}", "a.yaml")
    assert isinstance(tree, Mapping)
    with pytest.raises(RecipeError, match="part.steps=-1"):
        SCHEMA.file(tree, "a.yaml")


def test_positionals() -> None:
    assert words("runs/lr=3", "loud=true").run == "runs/lr=3"
    assert words("run=x").run == "x"
    assert words("a", "b", positionals=("run", "text")).text == "b"
    with pytest.raises(RecipeError, match="^run=: is required"):
        words()
    with pytest.raises(RecipeError, match=r"^word=b: is not key=value \(only run and"):
        words("a", "b")


def test_other_names() -> None:
    names = Names(aliases={"max_steps": "part.steps"}, absent={"epochs": "set part.steps"})
    notices: list[str] = []
    layer = SCHEMA.words(["max_steps=5"], names=names, notices=notices)
    assert layer["part.steps"].value == 5 and notices == ["max_steps is called part.steps here"]
    with pytest.raises(RecipeError, match=r"^part.steps=0: must be >= 1.*\(max_steps=0\)$"):
        SCHEMA.words(["max_steps=0"], names=names)
    with pytest.raises(RecipeError, match="^epochs=3: is not a setting here; set part.steps$"):
        SCHEMA.words(["epochs=3"], names=names)


@pytest.mark.parametrize("word", ["a\nb=1", "\ud800=1", "x" * 10_000 + "=1", "x=" + "y" * 10_000])
def test_messages_stay_on_one_short_line(word: str) -> None:
    with pytest.raises(RecipeError) as e:
        words(word, positionals=())
    assert str(e.value).isprintable() and len(str(e.value)) < 300
