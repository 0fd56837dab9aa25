"""Any value for any key, as a word or in a file: a recipe that keeps what was said, or one line.

The oracle reads the text by itself, with Decimal and plain comparisons, and knows the types and
ranges only from the declarations.
"""

from __future__ import annotations

import re
import typing
from decimal import Decimal, InvalidOperation
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ptm.common.errors import RecipeError
from ptm.common.parse import schema_of
from ptm.recipe import Recipe, dump, load_recipe

SCHEMA = schema_of(Recipe)
KEYS = sorted(SCHEMA.settings)

AWKWARD = """nan .nan NaN inf -inf .inf Infinity 1e400 -1e400 -1 0 -0 +1 1 2 7 64 0.0 -0.5 0.1
1.0 1.5 1e3 1e-3 1_000 1__000 _1 1_ 01 010 0o10 0x10 0b1 1:30 190:20:30 2026-11-22
9223372036854775807 9223372036854775808 -9223372036854775809 true false True FALSE yes no on off y
n null Null none None ~ ??? ${train.lr} ${oc.env:HOME} [] [1] [1,2] [a,b] [[1]] [ {} {a:1} 1,2 1,,2
, a,b auto full mini debug block bf16 fp32 fp16 linear python_stdlib m32 ../x /etc/passwd é ９ ١ １
😀 'x' "x" '1' "1" !!int !x &a *a #c : - % @ ` | >""".split()  # noqa: SIM905 (a list of them is hard to read)
AWKWARD += ["", " ", "  1", "a b", "a\nb", "\n", "\t", "\0", "\ud800", "\u200b", "\x85", "\u2028"]
VALUES = st.one_of(
    st.sampled_from(AWKWARD),
    st.integers().map(str),
    st.integers(-3, 10**7).map(str),
    st.floats().map(repr),
    st.floats(0, 10).map(repr),
    st.text(max_size=12),
    st.text("0123456789_.e+-x:", max_size=8),
)


def check(key: str, text: str, recipe: Recipe, *, in_file: bool = False) -> None:
    """Whether the recipe's value is what the text says, and what the declaration allows."""
    value = SCHEMA.flatten(recipe)[key]
    setting = SCHEMA.settings[key]
    args = typing.get_args(setting.type)
    kinds = [k for k in args if k is not type(None)] if type(None) in args else [setting.type]
    if value is None:
        nulls = ("null", "Null", "NULL", "none", "None", "~", "")
        assert type(None) in args and text in nulls, text
        return
    if isinstance(value, tuple):
        assert typing.get_origin(setting.type) is tuple
        parts = [text] if in_file else text.split(",")
        if text[:1] + text[-1:] == "[]":
            parts = [p.strip(" '\"") for p in text[1:-1].split(",")] if text != "[]" else []
        assert len(parts) == len(value)
        for part, v in zip(parts, value):
            check_one(part, v, typing.get_args(setting.type)[0])
    else:
        check_one(text, value, kinds[0])
    bounds = setting.range
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            assert abs(number) < float("inf")
            assert bounds is None or bounds.admits(number)


def check_one(text: str, value: Any, kind: type) -> None:
    assert type(value) is kind, f"{text!r} became {value!r}"
    if isinstance(value, Enum):
        assert value.value == text
    elif isinstance(value, bool):
        assert str(value).lower() == text.lower()
    elif isinstance(value, int):
        assert Decimal(text.replace("_", "")) == value and re.fullmatch(r"[+-]?[1-9]?[\d_]*", text)
    elif isinstance(value, float):
        assert float(Decimal(text.replace("_", ""))) == value
    else:
        assert value == text and value.isprintable() and "${" not in value


def load(words: list[str]) -> Recipe | None:
    """The recipe; None if it was refused in one line."""
    try:
        return load_recipe(words, has_accelerator=lambda: False)
    except RecipeError as e:
        message = str(e)
        assert re.fullmatch(r"[^\n]+=[^\n]*: [^\n]+; [^\n]+", message), message
        assert message.isprintable(), ascii(message)
        return None


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(key=st.sampled_from(KEYS), text=VALUES)
def test_any_word(key: str, text: str) -> None:
    recipe = load([f"{key}={text}"]) if key != "recipe" else None
    if recipe is not None:
        check(key, text, recipe)


@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(key=st.sampled_from(KEYS), text=VALUES)
def test_any_value_in_a_file(key: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "fuzz.yaml"
    line = f"{key}: {text}"
    file.write_bytes(f"base: m32\n{line}\n".encode("utf-8", "surrogatepass"))
    recipe = load([f"recipe={file}"])
    plain = text.partition(" #")[0].strip(" \t")
    if recipe is None or re.search(r"[\n\r\x85\u2028\u2029]", text):
        return
    if key == "model.scale" and plain == "auto":
        plain = "mini"  # resolved
    if plain[:1] in ("'", '"'):
        plain = plain[1:-1].replace("''", "'") if plain[0] == "'" else plain[1:-1]
    if plain[:1] != "#":
        check(key, plain, recipe, in_file=True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    words=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=3),
    scale=st.sampled_from(["mini", "debug", "full"]),
)
def test_what_is_accepted_survives_the_dump(
    words: list[tuple[str, str]], scale: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    given_words = [f"{k}={v}" for k, v in words if k not in ("recipe", "model.scale")]
    recipe = load([*given_words, f"model.scale={scale}"]) or load([f"model.scale={scale}"])
    assert recipe is not None
    file = tmp_path_factory.getbasetemp() / "dump.yaml"
    file.write_text(dump(recipe), encoding="utf-8")
    assert load_recipe([f"recipe={file}"]) == recipe
    # and OmegaConf, which knows nothing of our reader, makes the same of it
    theirs = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(file))
    assert OmegaConf.to_object(theirs) == recipe


def test_the_oracle_sees_silent_casts() -> None:
    assert load(["train.steps=200"]) is not None
    with pytest.raises((AssertionError, InvalidOperation)):
        check("train.steps", "0o310", load_recipe(["train.steps=200"]))
    with pytest.raises(AssertionError):
        check_one("1.5", 1, int)
    with pytest.raises(AssertionError):
        check_one("yes", True, bool)


@pytest.mark.parametrize(
    "word, rule, remedy",
    [
        ("train.lr=nan", "must be a finite number", "give > 0 and <= 10"),
        ("train.lr=.inf", "must be a finite number", "give > 0"),
        ("train.lr=0", "must be > 0 and <= 10", "change it"),
        ("train.lr=true", "must be a number", "3e-4"),
        ("train.steps=-5", "must be >= 1", "change it"),
        ("train.steps=010", "without leading zeros", "write 10"),
        ("train.steps=1e3", "must be an integer", "write 1000"),
        ("train.steps=1.5", "must be an integer", "whole number"),
        ("train.steps=[1]", "must be an integer", "1_000"),
        ("train.steps=9223372036854775808", "must fit 64 bits", "smaller"),
        ("train.steps=" + "9" * 5000, "must be an integer of 64 bits", "smaller"),
        ("train.steps=", "must be an integer", "1_000"),
        ("dry_run=yes", "must be true or false", "write true"),
        ("model.router=linaer", "must be one of attention, linear", "did you mean linear?"),
        ("data.text_key=", "is empty", "leave the key out"),
        ("data.text_key=null", "may not be null", "leave the key out"),
        ("data.text_key=[a]", "must be one text", "brackets"),
        ("data.tokenizer=${oc.env:HOME}", "reads no variables", "write the value out"),
        ("data.weights=1,-1", "must be > 0", "change it"),
        ("data.eval_fraction=1:30", "must be a number", "3e-4"),
        ("run.name=a/b", "must be a plain name", "set run.dir"),
        ("run.dir=a\nb", "must be printable text", "line breaks"),
    ],
    ids=lambda s: s[:20],
)
def test_what_the_line_says(word: str, rule: str, remedy: str) -> None:
    with pytest.raises(RecipeError) as e:
        load_recipe([word])
    shown, _, rest = str(e.value).partition(": ")
    assert shown.partition("=")[0] == word.partition("=")[0]
    assert rule in rest.partition("; ")[0] and remedy in rest.partition("; ")[2], e.value
