"""Questions with exact answers, made from a seed and the standard library: no download, any number.

    add, subtract       small numbers, in digits
    larger, longest     which of some numbers, or words
    first, last         a word of a list, by its place
    upper, count        a word in capitals; how many words there are
    name                a function's name, from its signature and docstring
    docstring           the first line of its docstring, from the function

Question number i of a task is a pure function of (seed, task, i). Which side of the split a
question is on follows from a hash of its text, as with documents (ptm/data/vocabulary.py), so no
held-out question was ever trained on, whatever the seeds. Fine-tuning, preferences and rewards all
draw on these.
"""

from __future__ import annotations

import ast
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ptm.common.errors import RecipeError, line
from ptm.data.config import PYTHON_STDLIB
from ptm.data.shard import text_hash
from ptm.data.source import find
from ptm.data.vocabulary import is_held_out

HELD_OUT = 0.1
"""Share of questions that are never trained on."""
MOST_SOURCE_BYTES = 30_000
"""Larger files of the standard library are left out: parsing them takes seconds."""
LONGEST_FUNCTION = 400
"""Characters of a function that a question may hold."""
_WORDS = """
apple bread chair door eagle fish garden house island jacket kitchen lemon mountain night orange
paper queen river stone table umbrella village window yellow zebra
"""
WORDS = tuple(_WORDS.split())


class Example(NamedTuple):
    """A question and the one right answer."""

    task: str
    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


def _add(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(20), draw.randrange(20)
    return f"What is {a} plus {b}?", str(a + b)


def _subtract(draw: random.Random) -> tuple[str, str]:
    a, b = sorted((draw.randrange(20), draw.randrange(20)), reverse=True)
    return f"What is {a} minus {b}?", str(a - b)


def _larger(draw: random.Random) -> tuple[str, str]:
    a, b = draw.sample(range(100), 2)
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def _longest(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, 2)
    while len(words[0]) == len(words[1]):
        words = draw.sample(WORDS, 2)
    return f"Which word is longer, {words[0]} or {words[1]}?", max(words, key=len)


def _first(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, draw.randrange(2, 5))
    return f"What is the first word of: {' '.join(words)}?", words[0]


def _last(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, draw.randrange(2, 5))
    return f"What is the last word of: {' '.join(words)}?", words[-1]


def _upper(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, draw.randrange(1, 3))
    return f"Write in capitals: {' '.join(words)}", " ".join(words).upper()


def _count(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, draw.randrange(1, 7))
    return f"How many words: {' '.join(words)}?", str(len(words))


class _Function(NamedTuple):
    head: str
    "`def name(arguments)` without the name."
    name: str
    docstring: str
    source: str


def _name(draw: random.Random) -> tuple[str, str]:
    f = draw.choice(_functions())
    return f"Name this function: def _{f.head}: {f.docstring}", f.name


def _docstring(draw: random.Random) -> tuple[str, str]:
    f = draw.choice(_functions())
    return f"Document this function:\n{f.source}", f.docstring


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": _add,
    "subtract": _subtract,
    "larger": _larger,
    "longest": _longest,
    "first": _first,
    "last": _last,
    "upper": _upper,
    "count": _count,
    "name": _name,
    "docstring": _docstring,
}
EXACT = tuple(name for name in TASKS if name not in ("name", "docstring"))
"""Tasks whose answer follows from the question; the other two ask for what somebody wrote."""


def examples(
    tasks: Sequence[str], count: int, *, seed: int, held_out: bool, key: str = "sft.tasks"
) -> list[Example]:
    """`count` different questions, the tasks taking turns, of one side of the split.

    A task that runs out of new questions drops out. Raises: RecipeError where all have run out.
    """
    streams = [_questions(name, seed, held_out) for name in dict.fromkeys(tasks)]
    found: list[Example] = []
    while len(found) < count and streams:
        for one in list(streams):
            example = next(one, None)
            if example is None:
                streams.remove(one)
            elif len(found) < count:
                found.append(example)
    if len(found) < count:
        rule = f"has only {len(found)} different questions on this side of the split"
        remedy = f"ask for fewer with {key.replace('tasks', 'task_rows')}, or name more tasks"
        raise RecipeError(line(key, tasks, rule, remedy))
    return found


def _questions(task: str, seed: int, held_out: bool) -> Iterator[Example]:
    seen: set[str] = set()
    tries = 0
    while tries < 2000:  # that many draws in a row brought nothing new: there is no more
        tries += 1
        draw = random.Random(f"{seed} {task} {held_out} {len(seen)} {tries}")
        question, answer = TASKS[task](draw)
        is_other_side = bool(is_held_out(text_hash(question.encode()), HELD_OUT)) != held_out
        if question in seen or is_other_side:
            continue
        seen.add(question)
        tries = 0
        yield Example(task, question, answer)


@functools.cache
def _functions() -> tuple[_Function, ...]:
    """Short documented functions of the standard library, in the order of its files."""
    found = []
    for file in find(PYTHON_STDLIB):
        if file.size_bytes > MOST_SOURCE_BYTES or "test" in file.name:
            continue
        try:
            with open(file.path, encoding="utf-8") as stream:
                text = stream.read()
            tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError):
            continue  # a file in another encoding, or one that is wrong on purpose
        lines = text.splitlines()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and (one := _function(node, lines)) is not None:
                found.append(one)
    return tuple(found)


def _function(node: ast.FunctionDef, lines: list[str]) -> _Function | None:
    docstring = (ast.get_docstring(node) or "").strip().split("\n")[0]
    if not 8 <= len(docstring) <= 80 or node.name.startswith("_"):
        return None
    after = node.body[0].end_lineno or node.lineno
    head = f"def {node.name}({ast.unparse(node.args)}):"
    source = "\n".join([head, *lines[after : node.end_lineno]])
    if len(source) > LONGEST_FUNCTION or "\0" in source:
        return None
    return _Function(f"({ast.unparse(node.args)})", node.name, docstring, source)
