"""Words of a command line and YAML files into config classes, or one line that says what to mend.

    schema = schema_of(Recipe)
    layer = {**schema.file(tree, name), **schema.words(["train.lr=3e-4", "--train.steps=100"])}
    recipe = schema.build(layer)

A `Layer` maps full keys (`train.lr`) to typed values and where each came from; later layers
simply replace earlier ones. Every given value is checked alone, also one that a later layer
replaces: unknown keys (with the nearest known one), types (ptm/common/values.py) and ranges
(from the class). `build` then makes the classes, whose own `check()` ties keys together; its
errors get their full key and the file and line too. Which files are read in which order, base
recipes and scales are ptm/recipe.py's work.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from ptm.common import strict_yaml
from ptm.common.config import Setting, check_number, settings
from ptm.common.errors import RecipeError, line
from ptm.common.near import MOST, nearest
from ptm.common.strict_yaml import at, error_at
from ptm.common.values import Mismatch, from_node, from_word, show

T = TypeVar("T")


class Given(NamedTuple):
    """One key's value and where it came from."""

    value: Any
    where: str
    "`file:line`, or the word that another name was typed in; empty for a plain `key=value`."


Layer = dict[str, Given]


class Names(NamedTuple):
    """Names that are not keys but that people type."""

    aliases: Mapping[str, str] = {}
    "Other name -> key; accepted with a notice."
    absent: Mapping[str, str] = {}
    "Name of something that is not a setting here -> what to do instead."


class Schema(Generic[T]):
    """All keys of a config class and of the sections below it."""

    def __init__(self, cls: type[T]) -> None:
        self.cls = cls
        self.settings: dict[str, Setting] = {}
        self.sections: dict[str, type] = {}
        self.prose: set[str] = set()
        "Keys that take any text as it stands; their field has metadata `prose`."
        self._collect(cls, "")

    def _collect(self, cls: type, prefix: str) -> None:
        self.prose.update(
            prefix + f.name for f in dataclasses.fields(cls) if f.metadata.get("prose")
        )
        for setting in settings(cls):
            key = prefix + setting.name
            if dataclasses.is_dataclass(setting.type):
                self.sections[key] = setting.type  # type: ignore[assignment]
                self._collect(setting.type, key + ".")  # type: ignore[arg-type]
            else:
                self.settings[key] = setting

    def words(
        self,
        words: Iterable[str],
        *,
        positionals: tuple[str, ...] = (),
        names: Names = Names(),  # noqa: B008 (immutable)
        notices: list[str] | None = None,
    ) -> Layer:
        """The layer of `key=value` words; a word that is not one fills the next of `positionals`.

        The last of two equal keys counts. Notices about aliases are appended to `notices`.
        """
        layer: Layer = {}
        free = list(positionals)
        for word in words:
            key, equals, text = word.removeprefix("--").partition("=")
            where = word
            if free and not word.startswith("-") and (not equals or "/" in key):
                key, text, where = free.pop(0), word, ""
            elif key in names.absent:
                rule = "is not a setting here"
                raise RecipeError(line(shown_key(key), text, rule, names.absent[key]))
            elif key in names.aliases:
                if notices is not None:
                    notices.append(f"{key} is called {names.aliases[key]} here")
                key = names.aliases[key]
            elif not equals and (key in self.settings or not word.startswith("-")):
                self._refuse_bare(word, key, positionals)
            if word.removeprefix("--") == f"{key}={text}":
                where = ""
            layer[key] = Given(self._from_word(key, text, where, names), where)
        return layer

    def file(self, tree: strict_yaml.Mapping, name: str, *, extra: Iterable[str] = ()) -> Layer:
        """The layer of one YAML tree; `extra` are keys the caller took out, for suggestions."""
        layer: Layer = {}
        self._read(tree, "", name, layer, tuple(extra))
        return layer

    def build(self, layer: Layer) -> T:
        """Make the config from defaults and a layer. Raises RecipeError with full keys."""
        return self._build(self.cls, "", layer)

    def flatten(self, config: T) -> dict[str, Any]:
        """Full key -> value of a made config."""
        return {key: functools.reduce(getattr, key.split("."), config) for key in self.settings}

    def _from_word(self, key: str, text: str, where: str, names: Names) -> Any:
        if key in self.sections:
            raise error_at(where, key, text, *self._is_section(key))
        if key not in self.settings:
            raise self.unknown(key, text, "", [*names.aliases])
        try:
            value = from_word(text, self.settings[key].type, is_prose=key in self.prose)
        except Mismatch as e:
            raise error_at(where, key, text, e.rule, e.remedy) from None
        self._check_range(key, value, where)
        return value

    def _read(
        self,
        tree: strict_yaml.Mapping,
        prefix: str,
        name: str,
        layer: Layer,
        extra: tuple[str, ...],
    ) -> None:
        for text, (line_number, node) in tree.entries.items():
            key = prefix + text
            where = f"{name}:{line_number}"
            shown = strict_yaml.text_of(node)
            if key in self.sections:
                if not isinstance(node, strict_yaml.Mapping):
                    raise error_at(where, key, shown, *self._is_section(key))
                self._read(node, key + ".", name, layer, extra)
                continue
            if key not in self.settings:
                raise self.unknown(key, shown, where, extra)
            if key in layer:
                rule = f"is already given at {layer[key].where}"
                raise error_at(where, key, shown, rule, "keep one of them")
            try:
                value = from_node(node, self.settings[key].type, is_prose=key in self.prose)
            except Mismatch as e:
                raise error_at(where, key, shown, e.rule, e.remedy) from None
            self._check_range(key, value, where)
            layer[key] = Given(value, where)

    def _build(self, cls: type, prefix: str, layer: Layer) -> Any:
        values = {}
        for setting in settings(cls):
            key = prefix + setting.name
            if key in self.sections:
                values[setting.name] = self._build(self.sections[key], key + ".", layer)
            elif key in layer:
                values[setting.name] = layer[key].value
            elif setting.default is dataclasses.MISSING:
                raise RecipeError(line(key, "", "is required", setting.meaning or "give a value"))
        try:
            return cls(**values)
        except RecipeError as e:
            raise RecipeError(self._located(str(e), prefix, layer)) from None

    def _located(self, message: str, prefix: str, layer: Layer) -> str:
        # A class names its own keys without the section, and knows no files.
        name = message.partition("=")[0]
        if prefix + name in self.settings:
            message = prefix + message
            name = prefix + name
        return message + at(layer[name].where) if name in layer else message

    def _check_range(self, key: str, value: Any, where: str) -> None:
        for number in value if isinstance(value, tuple) else (value,):
            try:
                check_number(key, number, self.settings[key].range)
            except RecipeError as e:
                raise RecipeError(str(e) + at(where)) from None

    def unknown(self, key: str, value: Any, where: str, extra: Iterable[str] = ()) -> RecipeError:
        """The error for a key that does not exist, with the nearest that do."""
        section = key.rpartition(".")[0]
        leaf = key.rpartition(".")[2]
        same_leaf = [k for k in self.settings if k.rpartition(".")[2] == leaf][:MOST]
        near = [] if section else same_leaf
        near = near or nearest(key, [*self.settings, *self.sections, *extra]) or same_leaf
        rule = f"no such key in section {section}" if section in self.sections else "no such key"
        remedy = f"did you mean {' or '.join(near)}?" if near else "--help lists every key"
        return error_at(where, shown_key(key), value, rule, remedy)

    def _is_section(self, key: str) -> tuple[str, str]:
        first = [k for k in self.settings if k.startswith(key + ".")][:MOST]
        return "is a section, not a value", f"set one of its keys: {', '.join(first)}, ..."

    def _refuse_bare(self, word: str, key: str, positionals: tuple[str, ...]) -> None:
        if key in self.settings:
            setting = self.settings[key]
            example = "true" if setting.type is bool else show(setting.default)
            raise RecipeError(line(key, "", "needs a value", f"write {key}={example}"))
        expected = f"only {', '.join(positionals)} and " if positionals else "only "
        near = nearest(key, [*self.settings])
        remedy = f"did you mean {near[0]}=VALUE?" if near else "write key=value"
        raise RecipeError(
            line(
                "word", shown_key(word), f"is not key=value ({expected}key=value are read)", remedy
            )
        )


def schema_of(cls: type[T]) -> Schema[T]:
    """The schema of a config class, made once."""
    if cls not in _SCHEMAS:
        _SCHEMAS[cls] = Schema(cls)
    return _SCHEMAS[cls]


_SCHEMAS: dict[type, Schema[Any]] = {}


def shown_key(key: str) -> str:
    """A key as typed, made safe for one line: cut at 80 characters, control characters escaped."""
    key = key if len(key) <= 80 else key[:77] + "..."
    return key if key.isprintable() else key.encode("unicode_escape").decode("ascii")
