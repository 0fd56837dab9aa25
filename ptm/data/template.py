"""Renders chat templates in Jinja's sandbox, in a child process of small means.

A template comes from a model folder or a data set, so it is somebody else's program. Here it gets
messages and returns text. It cannot reach an attribute of Python's internals (any try is an error,
not an empty string), change what it is given, load a file, or import; the process around it has
little memory and time (ptm/data/chat.py sets both), so a loop or a huge string ends it and nothing
else.

`{% generation %} ... {% endgeneration %}` marks what the model is to learn, as in transformers; the
marks come back as character spans of the text.
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Callable
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ptm.common.errors import DataError, line

MAX_TEMPLATE_CHARACTERS = 1 << 18
MAX_TEXT_CHARACTERS = 16 << 20


def handle(request: dict[str, Any], report: Callable[[Any], None]) -> list[dict[str, Any]]:
    """What a `Child` runs: render the first `count` messages for each (count, with_prompt) asked.

    Each answer holds `text` and `spans`, or `error` where the template gave up on these messages.
    Raises: DataError when the template is broken or tries what it may not.
    """
    template, marker = _compiled(request["template"])
    answers: list[dict[str, Any]] = []
    for count, with_prompt in request["renders"]:
        try:
            messages = request["messages"][:count]
            variables = {**request["variables"], "add_generation_prompt": with_prompt}
            marked = template.render(messages=messages, **variables)
        except _GaveUp as e:
            answers.append({"error": str(e)})
            continue
        except MemoryError:
            raise
        except Exception as e:  # whatever a template can do wrong
            raise _error(e) from None
        if len(marked) > MAX_TEXT_CHARACTERS:
            raise _error(f"the text is longer than {MAX_TEXT_CHARACTERS} characters")
        answers.append(_unmarked(marked, marker))
    return answers


class _GaveUp(TemplateError):
    """raise_exception() in a template."""


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:  # type: ignore[override]
        raise SecurityError(f"access to {attribute!r} is not allowed")


class _Generation(Extension):
    tags = {"generation"}
    marker = ""

    def parse(self, parser: Parser) -> nodes.Node:
        at = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(at)

    def mark(self, caller: Callable[[], str]) -> str:
        return f"{self.marker}{caller()}{self.marker}"


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[Any, str]:
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise _error(f"it is longer than {MAX_TEMPLATE_CHARACTERS} characters")
    # As transformers sets it up, so that templates written for it come out the same.
    environment: Environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    marker = secrets.token_hex(16)  # no message can hold it
    environment.extensions[_Generation.identifier].marker = marker  # type: ignore[attr-defined]
    for name in environment.globals.keys() - {"range", "namespace", "dict"}:
        del environment.globals[name]
    environment.globals["raise_exception"] = _give_up
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source), marker
    except MemoryError:
        raise
    except Exception as e:  # also RecursionError, from deep nesting
        raise _error(e) from None


def _give_up(message: str) -> NoReturn:
    raise _GaveUp(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _unmarked(marked: str, marker: str) -> dict[str, Any]:
    # Odd parts lie between two marks.
    text, spans = "", []
    for i, part in enumerate(marked.split(marker)):
        if i % 2 and part:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return {"text": text, "spans": spans}


def _error(why: object) -> DataError:
    name = f"{type(why).__name__}: " if isinstance(why, Exception) else ""
    rule = "cannot be used: " + " ".join(f"{name}{why}".split())[:300]
    return DataError(line("chat_template", "(given)", rule, "mend it, or use m32 or chatml"))
