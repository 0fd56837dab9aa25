"""Recipe files as a plain tree of text with line numbers, and nothing else.

YAML can build Python objects, expand one anchor into gigabytes, and read `010` as eight and
`off` as false. Here the parser's events are read directly, so nothing is ever constructed: a
file is a tree of mappings, lists and scalars, each with its line; whether a scalar is a number
is decided later, by the type of the key it is given to (ptm/common/values.py). Refused with
file and line: anchors, aliases, tags, duplicate keys, keys that are not plain text, a second
document, more than 20 levels or 20,000 nodes, more than 1 MiB, text that is not UTF-8, and
anything that is not a regular file (a pipe would be waited for).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from ptm.common.errors import RecipeError, line

MAX_FILE_BYTES = 2**20
MAX_DEPTH = 20
MAX_NODES = 20_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Scalar(NamedTuple):
    text: str
    is_quoted: bool
    line: int


class Items(NamedTuple):
    items: list[Any]
    line: int


class Mapping(NamedTuple):
    entries: dict[str, Any]
    "Key text -> (line of the key, node)."
    line: int


Node = Scalar | Items | Mapping


def at(where: str) -> str:
    """The end of a message about something in a file: ` (file:line)`, or nothing."""
    where = where if len(where) <= 400 else "..." + where[-397:]
    where = where if where.isprintable() else where.encode("unicode_escape").decode("ascii")
    return f" ({where})" if where else ""


def error_at(where: str, key: str, value: object, rule: str, remedy: str) -> RecipeError:
    """The error for something that stands in a file."""
    return RecipeError(line(key, value, rule, remedy) + at(where))


def is_file(path: Path) -> bool:
    """Like `Path.is_file`, and False for a path the system refuses (a name too long)."""
    try:
        return path.is_file()
    except OSError:
        return False


def text_of(node: Node) -> str:
    """A node as one writes it on one line, for messages."""
    if isinstance(node, Scalar):
        return node.text
    if isinstance(node, Items):
        return "[" + ", ".join(text_of(n) for n in node.items[:4]) + "]"
    return "{" + ", ".join(list(node.entries)[:4]) + "}"


def read_file(path: Path, *, key: str = "recipe") -> Mapping:
    """The tree of one YAML file; `key` is what the user set to name it. Raises RecipeError."""
    try:
        if not path.exists():
            raise RecipeError(line(key, path, "no such file", "check the path"))
        if not path.is_file():  # a folder; a pipe, which would be waited for
            raise RecipeError(line(key, path, "is not a file", "give the path of a .yaml file"))
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        rule = f"cannot be read ({e.strerror})"
        raise RecipeError(line(key, path, rule, "check the path and its permissions")) from None
    if len(data) > MAX_FILE_BYTES:
        raise RecipeError(
            line(key, path, f"must be at most {MAX_FILE_BYTES:,} bytes", "a recipe is a few lines")
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        rule = f"must be UTF-8 text (byte {e.start} is not)"
        raise RecipeError(line(key, path, rule, "save it as UTF-8")) from None
    node = read_text(text, str(path))
    if not isinstance(node, Mapping):
        raise RecipeError(
            line(key, path, "must hold `key: value` lines", "see recipes/README.md for an example")
        )
    return node


def read_text(text: str, name: str) -> Node:
    """The tree of a YAML text; `name` is the file in messages. Raises RecipeError."""
    reader = _Reader(name)
    events = yaml.parse(text, Loader=_LOADER)
    try:
        return reader.document(events)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        reader.refuse(mark.line if mark else 0, "", f"is not YAML: {e.problem}", "mend that line")
    except yaml.YAMLError:  # ReaderError: characters that YAML does not allow
        rule = "holds characters that YAML does not allow"
        reader.refuse(0, "", rule, "remove control characters")


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name
        self.num_nodes = 0

    def refuse(
        self, line_index: int, found: str, rule: str, remedy: str, *, key: str = "yaml"
    ) -> NoReturn:
        raise error_at(f"{self.name}:{line_index + 1}", key, found, rule, remedy)

    def document(self, events: Iterator[Any]) -> Node:
        found: Node = Mapping({}, 0)
        num_documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    at_line = event.start_mark.line
                    self.refuse(at_line, "---", "a recipe is one document", "remove the second")
                found = self.node(next(events), events, depth=1)
        return found

    def node(self, event: Any, events: Iterator[Any], *, depth: int) -> Node:
        first = event.start_mark.line
        self.num_nodes += 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            rule = "anchors and aliases are not allowed"
            self.refuse(first, f"{sign}{event.anchor}", rule, "write the value out")
        if event.tag is not None:
            self.refuse(first, event.tag, "tags are not allowed", "remove it")
        if depth > MAX_DEPTH:
            self.refuse(first, "", f"is over {MAX_DEPTH} levels deep", "a recipe has two")
        if self.num_nodes > MAX_NODES:
            self.refuse(first, "", f"holds over {MAX_NODES:,} values", "a recipe is a few lines")
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(event.value, bool(event.style), first + 1)  # style: a quote, | or >
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                items.append(self.node(event, events, depth=depth + 1))
            return Items(items, first + 1)
        entries: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self.node(event, events, depth=depth + 1)
            if not isinstance(key, Scalar):
                rule = "is no key: a key is plain text"
                self.refuse(event.start_mark.line, text_of(key), rule, "write `key: value`")
            value = self.node(next(events), events, depth=depth + 1)
            if key.text in entries:
                rule = f"the same key is on line {entries[key.text][0]}"
                name = key.text[:80]
                self.refuse(key.line - 1, text_of(value), rule, "keep one of them", key=name)
            entries[key.text] = (key.line, value)
        return Mapping(entries, first + 1)
