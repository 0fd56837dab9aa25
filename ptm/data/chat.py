"""Conversations become tokens, and a mask of those the model is to learn: its answers.

A chat template (Jinja) writes the conversation as text. Which characters are answers follows from

    1  `{% generation %}` marks in the template, taken as they are; or
    2  the difference between the text up to an answer and the text with it: rendering one message
       more must only append. What is appended is the header that prompts the model, the answer, and
       whatever ends the turn (`<|im_end|>`, `<eod>`): all but the header is learned.

Where neither gives an answer (a template that rewrites earlier turns, an answer that is changed on
the way, a turn without an end) the conversation is refused. A mask that is guessed trains a model
that never stops or that repeats its users, and nobody sees it in the loss.

Text is encoded in the pieces the mask cuts it into, which is what happens when the model is used:
the prompt is encoded alone and the answer is sampled after it. Special tokens count where the
template wrote them, and a message that spells one is refused.

M32's own form is `question<sep>answer<eod>`, earlier turns joined by a newline (its `<n>`); so only
the last answer of a conversation is learned. Templates run in a child process, see
ptm/data/template.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ptm.common.errors import DataError, OutOfPages, line
from ptm.data.child import Child
from ptm.data.tokenizer import Tokenizer

M32 = (
    "{%- for message in messages -%}"
    "{%- if loop.last and message.role == 'assistant' -%}"
    "<sep>{% generation %}{{ message.content }}<eod>{% endgeneration %}"
    "{%- else -%}"
    "{{ '' if loop.first else '\\n' }}{{ message.content }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{ '<sep>' if add_generation_prompt else '' }}"
)
CHATML = (
    "{%- for message in messages -%}"
    "<|im_start|>{{ message.role }}\n"
    "{%- if message.role == 'assistant' -%}"
    "{{ '\\n' }}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{%- else -%}"
    "{{ '\\n' }}{{ message.content }}<|im_end|>{{ '\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)
TEMPLATES = {"m32": M32, "chatml": CHATML}

PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 plus 1?"},
    {"role": "assistant", "content": "2"},
]
"""What any template can render, with the system's message or without."""

RENDER_S = 2.0
RENDER_MEMORY_BYTES = 400 << 20


class TemplateError(DataError):
    """The template is at fault, with every conversation or with this one; `rule` says how."""

    def __init__(self, rule: str, remedy: str) -> None:
        super().__init__(line("chat_template", "(given)", rule, remedy))
        self.rule = rule


def reason_of(error: DataError) -> str:
    """Why a conversation cannot be encoded, for a line that names the conversation itself."""
    return str(error).partition("=(given): ")[2] or str(error)


class Segment(NamedTuple):
    """A piece of the rendered text, and whether the model is to learn it."""

    text: str
    is_learned: bool


class ChatTemplate:
    """A template ready to render; starts its process when first used, `close` ends it."""

    def __init__(
        self, source: str, *, name: str = "(given)", bos_token: str = "", eos_token: str = "<eod>"
    ) -> None:
        """`source` is Jinja, or a name in TEMPLATES; the tokens are variables it may use; `name`
        is what a recipe calls it."""
        self.source, self.name = TEMPLATES.get(source, source), name
        self.variables = {"bos_token": bos_token, "eos_token": eos_token}
        self.child: Child | None = None

    def check(self) -> None:
        """Raise DataError where it cannot be compiled, or fails on plain conversations; not where
        it refuses them, as it may want another form."""
        fault = None
        for messages in PLAIN, PLAIN[1:]:
            try:
                self._render(messages, [(len(messages), False)])
                return
            except TemplateError as error:
                fault = error
        assert fault is not None
        raise self.refusal(fault.rule) from fault

    def refusal(self, rule: str) -> DataError:
        """The error of a recipe with this template."""
        return DataError(line("sft.template", self.name, rule, "mend it, or use m32 or chatml"))

    def prompt(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text after which the model answers. Raises: DataError."""
        _check(messages)
        [answer] = self._render(messages, [(len(messages), True)])
        return _text(answer)

    def encode_prompt(self, messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[int]:
        """Tokens of `prompt`. Raises: DataError."""
        _refuse_specials(messages, tokenizer)
        return tokenizer.encode(self.prompt(messages), special=True)

    def segments(self, messages: Sequence[dict[str, Any]]) -> list[Segment]:
        """The conversation's text, cut at the bounds of what is learned.

        Raises: DataError when the template is unusable or no mask can be told.
        """
        _check(messages)
        whole = len(messages)
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns:
            raise _error("has no message of the assistant", "leave the conversation out")
        [answer] = self._render(messages, [(whole, False)])
        text, spans = _text(answer), answer["spans"]
        if not spans:
            asked = [(n, with_prompt) for i in turns for n, with_prompt in _around(i)]
            found = self._render(messages, asked)
            spans = [
                _derive(text, *found[3 * i : 3 * i + 3], content=messages[turn]["content"])
                for i, turn in enumerate(turns)
            ]
        segments, at = [], 0
        for start, stop in spans:
            segments += [Segment(text[at:start], False), Segment(text[start:stop], True)]
            at = stop
        segments = [s for s in (*segments, Segment(text[at:], False)) if s.text]
        if all(s.is_learned for s in segments):
            raise _error("renders answers only, with no prompt", "begin with a message of the user")
        return segments

    def encode(
        self, messages: Sequence[dict[str, Any]], tokenizer: Tokenizer
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a conversation and which of them are learned: two (T,) arrays, int64 and bool.

        Raises: DataError.
        """
        _refuse_specials(messages, tokenizer)
        ids: list[int] = []
        mask: list[bool] = []
        for text, is_learned in self.segments(messages):
            part = tokenizer.encode(text, special=True)
            ids += part
            mask += [is_learned] * len(part)
        return np.array(ids, np.int64), np.array(mask, bool)

    def close(self) -> None:
        if self.child is not None:
            self.child.close()
            self.child = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _render(self, messages: Sequence[dict[str, Any]], renders: Any) -> list[dict[str, Any]]:
        if self.child is None:
            self.child = Child("ptm.data.template", memory_bytes=RENDER_MEMORY_BYTES)
        request = {
            "template": self.source,
            "variables": self.variables,
            "messages": list(messages),
            "renders": renders,
        }
        try:
            return self.child.call(request, what="chat template", time_s=RENDER_S)
        except OutOfPages:
            limit = f"takes more than {RENDER_MEMORY_BYTES >> 20} MiB to render"
            raise TemplateError(limit, "simplify it") from None
        except DataError as error:  # `key=value: rule; remedy`
            rule, _, remedy = str(error).partition(": ")[2].rpartition("; ")
            raise TemplateError(rule, remedy) from None
        finally:
            if self.child.process.poll() is not None:  # dead; the next call starts another
                self.close()


def _around(turn: int) -> tuple[tuple[int, bool], ...]:
    # What is rendered to find an answer: up to it with the model's header, up to it, and with it.
    return (turn, True), (turn, False), (turn + 1, False)


def _derive(
    text: str, prompted: dict[str, Any], before: dict[str, Any], after: dict[str, Any], content: str
) -> tuple[int, int]:
    """Characters [start, stop) of one answer and the end of its turn: rule 2 of the module."""
    remedy = "mark answers in the template with {% generation %}"
    upto = _text(after)
    content = content.strip()  # as most templates do
    if not text.startswith(upto):
        rule = "the template rewrites earlier turns, so answers cannot be told"
        raise TemplateError(rule, remedy)
    if not content:
        raise _error("an answer is empty", "leave it out")
    # A template may not heed add_generation_prompt: then only a search tells header from answer.
    has_prompt = "text" in prompted and prompted["text"] != before.get("text")
    if has_prompt and upto.startswith(prompted["text"]):
        start = len(prompted["text"])  # all that follows is the model's to write
        at = upto.find(content, start)
    elif "text" in before and upto.startswith(before["text"]):
        start = at = upto.find(content, len(before["text"]))
        if upto.count(content, len(before["text"])) > 1:
            raise TemplateError("an answer's text is also in the template's header", remedy)
    else:
        raise TemplateError("an answer cannot be told from what comes before it", remedy)
    if at < 0:
        raise TemplateError("the template changes an answer, so it cannot be found", remedy)
    end = upto[at + len(content) :]
    if not end:
        rule = "nothing ends the answer's turn, so a model would never stop"
        raise TemplateError(rule, remedy)
    # A line end after the token that ends a turn belongs to the next one; alone it is the end.
    return start, at + len(content) + len(end.rstrip() or end)


def _check(messages: Sequence[dict[str, Any]]) -> None:
    for message in messages:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise _error("a message is not {role, content} of strings", "leave it out")


def _refuse_specials(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> None:
    _check(messages)
    for message in messages:
        for name in tokenizer.specials:
            if name in message["content"]:
                raise _error(f"a message spells the special token {name}", "leave it out")


def _text(answer: dict[str, Any]) -> str:
    if "error" in answer:
        raise TemplateError(f"the template refuses it: {answer['error'][:200]}", "leave it out")
    return answer["text"]


def _error(rule: str, remedy: str) -> DataError:
    return DataError(line("conversation", "(given)", rule, remedy))
