"""How a component declares its settings.

    @config
    class TrainConfig:
        lr: float = ranged(3e-4, above=0.0, most=1.0)
        "Peak learning rate."

`config` is a frozen, slotted, keyword-only dataclass whose ranges are checked whenever one is made,
from a recipe or from code, and whose floats are always finite. The string under a field is its
documentation: `--help`, the docs page and the tests read it with `settings()`. Parsing words and
YAML files into these classes is the work of ptm/common/parse.py.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import typing
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from typing_extensions import dataclass_transform

from ptm.common.errors import RecipeError, line

T = TypeVar("T")


class Choice(str, Enum):
    """Base of all enums in recipes; values are what is written, names the same without hyphens."""

    def __str__(self) -> str:
        return str(self.value)


class Range(NamedTuple):
    """Bounds of a number; None is open."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def admits(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = [
            f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}"
            for sign, bound in zip(
                (">=", ">", "<=", "<"), (self.least, self.above, self.most, self.below)
            )
            if bound is not None
        ]
        return " and ".join(words)


class Setting(NamedTuple):
    """One key as `--help` shows it."""

    name: str
    type: Any
    default: Any
    range: Range | None
    meaning: str


def ranged(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field holding a number (or None, or a tuple of numbers) within bounds."""
    return dataclasses.field(default=default, metadata={"range": Range(least, above, most, below)})


# Without `ranged`: checkers want a keyword `default` in these, or they call the field required.
_SPECIFIERS = (dataclasses.field,)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=_SPECIFIERS)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass that checks its ranges, then calls its own `check()` if any."""

    def __post_init__(self: Any) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            for number in value if isinstance(value, (tuple, list)) else (value,):
                check_number(f.name, number, f.metadata.get("range"))
        check = getattr(self, "check", None)
        if check is not None:
            check()

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(cls)


def check_number(key: str, value: Any, bounds: Range | None) -> None:
    """Raise RecipeError unless `value` is finite and within `bounds`; what is no number passes."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        remedy = f"give {bounds or 'a number'}"
        raise RecipeError(line(key, value, "must be a finite number", remedy))
    if bounds is not None and not bounds.admits(value):
        remedy = "change it, or leave it out for the default"
        raise RecipeError(line(key, value, f"must be {bounds}", remedy))
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise RecipeError(line(key, value, "must fit 64 bits", "give a smaller number"))


@functools.cache
def settings(cls: type) -> tuple[Setting, ...]:
    """Every key of a config class in order, with type, default, range and the string under it."""
    meanings = _strings_under_fields(cls)
    types = typing.get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        bounds, meaning = f.metadata.get("range"), meanings.get(f.name, "")
        found.append(Setting(f.name, types[f.name], default, bounds, meaning))
    return tuple(found)


def _strings_under_fields(cls: type) -> dict[str, str]:
    # A string literal after an assignment is thrown away by Python, so it is read from the source.
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, below in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            constant = below.value
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                found[field.target.id] = " ".join(constant.value.split())  # type: ignore[attr-defined]
    return found
