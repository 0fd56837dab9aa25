"""One piece of text into the value that a key's type asks for, with no silent casts.

The type decides how text is read, not the text how it looks: `off` is the choice `off` for an
enum and an error for a switch; `010`, `1:30` and `2e3` are never integers; quoted `'5'` is
text. Numbers are ASCII, may group digits with `_` (`1_000`), and never begin with a needless
zero. `nan` and `inf` are read, so that the range check can refuse them by name. A list of one
needs no brackets; on the command line items are separated by commas.

Types: bool, int, float, str, subclasses of Choice, tuple[X, ...] of these, and each of them `|
None`.
"""

from __future__ import annotations

import os
import re
import types
import typing
from typing import Any

import yaml

from ptm.common.config import Choice
from ptm.common.errors import RecipeError
from ptm.common.near import nearest
from ptm.common.strict_yaml import Items, Mapping, Node, Scalar, read_text

_INT = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(
    r"[+-]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
    r"|[+-]?\.?(inf|nan|infinity)",
    re.IGNORECASE,
)
_NULLS = ("null", "Null", "NULL", "none", "None", "~", "")
_MAX_NUMBER_CHARS = 64
_MAX_TEXT_CHARS = 4096
_RESOLVER: Any = yaml.resolver.Resolver()


class Mismatch(Exception):
    """The text is not a value of the type; `rule` and `remedy` finish the user's line."""

    def __init__(self, rule: str, remedy: str) -> None:
        super().__init__(rule)
        self.rule = rule
        self.remedy = remedy


def from_word(text: str, hint: Any, *, is_prose: bool = False) -> Any:
    """A value from the command line. `is_prose` takes any text as it stands (a prompt)."""
    kind, is_optional = unwrap(hint)
    if is_prose:
        return _prose(text)
    if is_optional and text in _NULLS and not (_is_choice(kind) and text in _words(kind)):
        if text == "":
            raise Mismatch("is empty", "write null for none, or leave the key out")
        return None
    if typing.get_origin(kind) is tuple:
        return _tuple_from_word(text, kind)
    if text.startswith("~/"):  # a shell does not expand it behind key=
        text = os.path.expanduser(text)
    if kind is str and text[:1] + text[-1:] in ("[]", "{}"):
        raise Mismatch("must be one text, not a list or mapping", "remove the brackets")
    return _scalar(text, kind)


def from_node(node: Node, hint: Any, *, is_prose: bool = False) -> Any:
    """A value from a YAML file."""
    kind, is_optional = unwrap(hint)
    if isinstance(node, Mapping):
        raise Mismatch(f"must be {describe(hint)}, not a mapping", "give one value")
    if typing.get_origin(kind) is tuple:
        (item,) = {h for h in typing.get_args(kind) if h is not Ellipsis}
        if isinstance(node, Items):
            return tuple(from_node(n, item) for n in node.items)
        if not (is_optional and _is_null(node)):
            return (from_node(node, item),)
    if isinstance(node, Items):
        raise Mismatch(f"must be {describe(hint)}, not a list", "give one value")
    if _is_null(node):
        if is_optional:
            return None
        raise Mismatch(f"must be {describe(hint)}, not null", "give a value or remove the line")
    if is_prose:
        return _prose(node.text)
    if kind is str:
        if not node.is_quoted and _looks_like(node.text) != "str":
            raise Mismatch(
                f"must be text, and YAML may read it as {_looks_like(node.text)}",
                "put it in quotes",
            )
    elif node.is_quoted and not _is_choice(kind):
        raise Mismatch(f"must be {describe(hint)}, not text", "remove the quotes")
    return _scalar(node.text, kind)


def unwrap(hint: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), anything else as (hint, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [h for h in typing.get_args(hint) if h is not type(None)]
        assert len(kinds) == 1, f"{hint}: a setting is one type, or that type | None"
        return kinds[0], True
    return hint, False


def describe(hint: Any) -> str:
    """The type in the words of `--help`: `int`, `auto|full`, `list of str`, `str or null`."""
    kind, is_optional = unwrap(hint)
    if typing.get_origin(kind) is tuple:
        name = f"list of {describe(typing.get_args(kind)[0])}"
    elif _is_choice(kind):
        name = "|".join(_words(kind))
    else:
        name = {bool: "true|false", int: "int", float: "float", str: "text"}[kind]
    return f"{name} or null" if is_optional else name


def show(value: Any) -> str:
    """A value as one would type it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(show(v) for v in value) + "]"
    return str(value)


def _scalar(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() in ("true", "false") and text != "":
            return text.lower() == "true"
        yes = text.lower() in ("yes", "on", "y", "1")
        raise Mismatch("must be true or false", f"write {'true' if yes else 'true or false'}")
    if kind is int:
        return _int(text)
    if kind is float:
        if len(text) <= _MAX_NUMBER_CHARS and _FLOAT.fullmatch(text):
            return float(text.lstrip("+").replace(".inf", "inf").replace(".nan", "nan"))
        raise Mismatch("must be a number", "write it like 3e-4, 0.1 or 1_000")
    if _is_choice(kind):
        words = _words(kind)
        if text in words:
            return words[text]
        names = ", ".join(words)
        near = nearest(text, words)
        raise Mismatch(
            f"must be one of {names}", f"did you mean {near[0]}?" if near else "pick one"
        )
    assert kind is str, f"{kind}: no setting has this type"
    return _text(text)


def _int(text: str) -> int:
    if len(text) <= _MAX_NUMBER_CHARS and _INT.fullmatch(text):
        return int(text)
    if re.fullmatch(r"[+-]?[0-9_]+", text, re.ASCII):
        if len(text) > _MAX_NUMBER_CHARS:
            raise Mismatch("must be an integer of 64 bits", "give a smaller number")
        digits = text.lstrip("+-_0").replace("_", "") or "0"
        raise Mismatch("must be an integer without leading zeros", f"write {digits}")
    if len(text) <= _MAX_NUMBER_CHARS and _FLOAT.fullmatch(text):
        number = float(text.lstrip("+").replace(".inf", "inf").replace(".nan", "nan"))
        if abs(number) < 2**53 and number == int(number):
            raise Mismatch("must be an integer", f"write {int(number)}")
        raise Mismatch("must be an integer", "give a finite whole number")
    raise Mismatch("must be an integer", "write it like 1000 or 1_000")


def _text(text: str) -> str:
    if "${" in text:
        raise Mismatch("`${` is not allowed: a recipe reads no variables", "write the value out")
    if len(text) > _MAX_TEXT_CHARS:
        raise Mismatch(f"must be at most {_MAX_TEXT_CHARS} characters", "shorten it")
    if not text.isprintable():
        raise Mismatch("must be printable text", "remove control characters and line breaks")
    if not text.strip():
        raise Mismatch("is empty", "give a text, or leave the key out")
    if text in _NULLS or text == "???":
        raise Mismatch("may not be null", "give a text, or leave the key out")
    return text


def _prose(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Mismatch("must be UTF-8 text", "check the encoding of your terminal") from None
    return text


def _tuple_from_word(text: str, kind: Any) -> tuple[Any, ...]:
    item = typing.get_args(kind)[0]
    if text.startswith("[") and text.endswith("]"):
        try:
            node = read_text(text, "value")
        except RecipeError:
            raise Mismatch("is not a list", "write it like [a, b] or a,b") from None
        if isinstance(node, Items):
            return from_node(node, kind)
    if not text:
        raise Mismatch("is empty", "write [] for no items, or leave the key out")
    return tuple(_scalar(part, item) for part in text.split(","))


def _is_choice(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Choice)


def _words(kind: Any) -> dict[str, Any]:
    """What may be written for each member."""
    return {str(member): member for member in kind}


def _is_null(node: Any) -> bool:
    return (
        isinstance(node, Scalar)
        and not node.is_quoted
        and node.text in ("null", "~", "", "Null", "NULL")
    )


def _looks_like(text: str) -> str:
    tag = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False))
    return tag.rpartition(":")[2]
