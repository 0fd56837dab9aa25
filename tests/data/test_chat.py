"""Masks of conversations against masks written by hand; templates that attack get nowhere (T11)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ptm.common.errors import DataError
from ptm.data.chat import TEMPLATES, ChatTemplate
from ptm.data.pack import sft_loss_mask
from ptm.data.tokenizer import Tokenizer

TWO_TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and\n3?"},
    {"role": "assistant", "content": " 5 "},
]
ONE_TURN = TWO_TURNS[1:3]

# Templates as they are found in model folders, none with {% generation %}.
PLAIN = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
        "+ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n"
        "{% elif m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
        "{% else %}{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "lines": (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
}

# What each template makes of TWO_TURNS; what is learned stands in [[ ]].
BY_HAND = {
    "m32": "be brief\n2+2?\n4\nand\n3?<sep>[[ 5 <eod>]]",
    "chatml": (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n[[4<|im_end|>]]\n<|im_start|>user\nand\n3?<|im_end|>\n"
        "<|im_start|>assistant\n[[ 5 <|im_end|>]]\n"
    ),
    "plain chatml": (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n[[4<|im_end|>]]\n<|im_start|>user\nand\n3?<|im_end|>\n"
        "<|im_start|>assistant\n[[ 5 <|im_end|>]]\n"
    ),
    "plain llama": ("be brief\n[INST] 2+2? [/INST] [[4 <eod>]][INST] and\n3? [/INST] [[5 <eod>]]"),
    "plain lines": (
        "SYSTEM: be brief\nUSER: 2+2?\nASSISTANT:[[ 4\n]]USER: and\n3?\nASSISTANT:[[ 5\n]]"
    ),
}


def template(name: str) -> ChatTemplate:
    return ChatTemplate(PLAIN[name.removeprefix("plain ")] if "plain" in name else name)


def marked(chat: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    return "".join(f"[[{s.text}]]" if s.is_learned else s.text for s in chat.segments(messages))


@pytest.mark.parametrize("name", BY_HAND)
def test_mask_is_the_one_written_by_hand(name: str, tokenizer: Tokenizer) -> None:
    with template(name) as chat:
        assert marked(chat, TWO_TURNS) == BY_HAND[name]
        ids, mask = chat.encode(TWO_TURNS, tokenizer)
        assert 0 < mask.sum() < len(mask) == len(ids)
        learned, text = tokenizer.decode(ids[mask]), BY_HAND[name]
        parts = [part.split("]]")[0] for part in text.split("[[")[1:]]
        assert learned == "".join(parts).replace("<eod>", "")
        whole = re.sub(r"\[\[|\]\]|<eod>|<sep>", "", text)
        assert tokenizer.decode(ids) == whole
        if "<eod>" in text:
            assert mask[ids == tokenizer.eod_id].all()


@pytest.mark.parametrize("name", BY_HAND)
def test_prompt_is_what_stands_before_the_answer(name: str) -> None:
    with template(name) as chat:
        before = BY_HAND[name].rsplit("[[", 1)[0].replace("[[", "").replace("]]", "")
        assert before.startswith(chat.prompt(TWO_TURNS[:-1]).rstrip(" "))


def test_m32_is_the_published_form(tokenizer: Tokenizer) -> None:
    with ChatTemplate("m32") as chat:
        ids, mask = chat.encode(ONE_TURN, tokenizer)
        text = [*tokenizer.encode("2+2?"), tokenizer.sep_id]
        answer = [*tokenizer.encode("4"), tokenizer.eod_id]
        assert ids.tolist() == text + answer
        assert mask.tolist() == [False] * len(text) + [True] * len(answer)
        # Megatron's mask is over labels and counts the <sep> too; but for it they are the same.
        megatron = sft_loss_mask(ids[None, 1:], eod_id=tokenizer.eod_id, sep_id=tokenizer.sep_id)
        assert megatron[0].tolist() == (mask[1:] | (ids[1:] == tokenizer.sep_id)).tolist()


ANSWER_IN_HEADER = [
    {"role": "user", "content": "say"},
    {"role": "assistant", "content": "assistant"},
]


def test_answer_that_is_a_word_of_the_header() -> None:
    for name in ("chatml", "plain chatml"):
        with template(name) as chat:
            assert marked(chat, ANSWER_IN_HEADER).endswith(
                "<|im_start|>assistant\n[[assistant<|im_end|>]]\n"
            )


REFUSED = {
    "rewrites": (
        "{% for m in messages %}{{ m.role }} {{ m.content if loop.last else '_' }}|{% endfor %}",
        "rewrites earlier turns",
    ),
    "changes": ("{% for m in messages %}{{ m.content | upper }}|{% endfor %}", "changes an answer"),
    "endless": ("{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}", "never stop"),
    "header": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}",
        "also in the template's header",
    ),
    "answers only": (
        "{% for m in messages if m.role == 'assistant' %}{% generation %}{{ m.content }}."
        "{% endgeneration %}{% endfor %}",
        "with no prompt",
    ),
    "gives up": ("{{ raise_exception('only French') }}", "refuses it: only French"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_where_no_mask_can_be_told(kind: str) -> None:
    source, rule = REFUSED[kind]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "assistant!"}]
    if kind == "header":
        messages = ANSWER_IN_HEADER
    if kind in ("rewrites", "changes", "endless"):
        messages = [*messages, {"role": "user", "content": "so"}, messages[1]]
        messages = messages[:2] if kind == "endless" else messages
    with ChatTemplate(source) as chat, pytest.raises(DataError, match=rule) as e:
        chat.segments(messages)
    assert "\n" not in str(e.value)


def test_refused_conversations(tokenizer: Tokenizer) -> None:
    with ChatTemplate("m32") as chat:
        for messages, rule in (
            ([], "no message of the assistant"),
            (TWO_TURNS[:2], "no message of the assistant"),
            ([{"role": "assistant", "content": 3}], "not {role, content} of strings"),
            (["hi"], "not {role, content} of strings"),
        ):
            with pytest.raises(DataError, match=rule):
                chat.segments(messages)
        spelled = [{"role": "user", "content": "a<sep>b<eod>"}, ONE_TURN[1]]
        with pytest.raises(DataError, match="spells the special token <(eod|sep)>"):
            chat.encode(spelled, tokenizer)
        with pytest.raises(DataError, match="spells the special token <(eod|sep)>"):
            chat.encode_prompt(spelled[:1], tokenizer)
    with ChatTemplate(PLAIN["chatml"]) as chat, pytest.raises(DataError, match="answer is empty"):
        chat.segments([ONE_TURN[0], {"role": "assistant", "content": " "}])


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ messages | attr('__class__') }}",
    "{{ messages[0] | map(attribute='__class__') | list }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ raise_exception.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{{ ['{0.__class__}'] | map('format', 1) | list }}{{ ''.format_map.__self__ }}",
    "{{ (messages | first).update({'content': 'x'}) }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'base' %}",
    "{{ dict.__base__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ tojson.__globals__ }}",
    "{{ joiner.__call__ }}",
    "{{ messages.__reduce_ex__(2) }}",
    "{% if %}",
    "{% generation %}",
    "{{ 1 / 0 }}",
    "{{ undefined_thing.attribute }}",
    "{" * 50 + "(" * 100_000,
    "x" * (1 << 19),
]
HUNGRY = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ '%1000000000d' % 1 }}",
    "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% for i in range(30000) %}{{ 'a' * 1000 }}{% endfor %}",
    "{{ 3**3**3**3 | int }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'a' | center(10**10) }}",
]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_attacks_are_errors(attack: str, canary: Path) -> None:
    source = attack.replace("CANARY", str(canary))
    with ChatTemplate(source) as chat, pytest.raises(DataError) as e:
        chat.prompt(ONE_TURN)
    assert "\n" not in str(e.value) and e.value.exit_code == 4


@pytest.mark.parametrize("attack", HUNGRY, ids=range(len(HUNGRY)))
def test_hungry_templates_end_soon_and_the_next_call_works(
    attack: str, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.monotonic()
    with ChatTemplate(attack) as chat:
        with pytest.raises(DataError):
            chat.segments(ONE_TURN)
        chat.source = TEMPLATES["m32"]
        assert chat.prompt(ONE_TURN[:1]) == "2+2?<sep>"
    assert time.monotonic() - begun < 20  # 2 s of rendering on a busy machine


def test_marks_cannot_be_forged() -> None:
    """Text of a user that looks like the mark of {% generation %} stays text."""
    with ChatTemplate("chatml") as chat:
        messages = [
            {"role": "user", "content": "{% generation %}x{% endgeneration %}"},
            ONE_TURN[1],
        ]
        assert marked(chat, messages).count("[[") == 1
        assert "{% generation %}x" in chat.segments(messages)[0].text
