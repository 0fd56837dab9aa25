"""Conversations: forms, masks, cuts, packing, and bad rows by file and line."""

import json
from pathlib import Path

import numpy as np
import pytest

from ptm.common.errors import DataError, RecipeError
from ptm.data.chat import M32, ChatTemplate
from ptm.data.config import DataConfig
from ptm.data.conversations import BadRow, BadSeen, messages_of
from ptm.data.loader import Loader
from ptm.data.preferences import Maker, open_pairs, open_prompts
from ptm.data.sft import PackedRows, chat_template, open_conversations
from ptm.data.sft_config import TASK_NAMES, SftConfig
from ptm.data.tasks import EXACT, TASKS, examples
from ptm.data.tokenizer import Tokenizer

PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "input": "", "output": "A"},
    ],
)
def test_three_forms_are_one(row: dict):
    assert messages_of(row) == PAIR


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": []}, "'messages' is empty"),
        ({"messages": PAIR[::-1]}, "roles are out of order: message 1 is of 'assistant'"),
        ({"messages": PAIR[:1]}, "ends without an answer"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": " "}]}, "message 2 .* empty text"),
        ({"messages": [{"role": "system", "content": "S"}]}, "no message but the system's"),
        ({"text": "plain"}, "has none of 'messages'"),
        ({"messages": ["Q", "A"]}, "message 1 is not an object"),
    ],
)
def test_a_bad_conversation_is_told(row: dict, reason: str):
    with pytest.raises(BadRow, match=reason):
        messages_of(row)


def conversations(path: Path, rows: list, tokenizer: Tokenizer, *, most=64, template="m32"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(bad_rows="fail", eval_fraction=0.3)  # type: ignore[arg-type]
    sft = SftConfig(source=(str(path),), template=template)
    with chat_template(sft, tokenizer, None) as made:
        return open_conversations(sft, data, tokenizer, made, most_tokens=most, is_shown=False)


def rows_of(*answers: str) -> list:
    return [{"messages": [PAIR[0], {"role": "assistant", "content": answer}]} for answer in answers]


def test_bad_rows_name_file_and_line(tmp_path: Path, tokenizer: Tokenizer):
    path = tmp_path / "a.jsonl"
    many = [f"answer {i}" for i in range(20)]
    with pytest.raises(DataError, match=r"first .*a.jsonl:3: roles are out of order"):
        conversations(path, [*rows_of(*many[:2]), {"messages": PAIR[::-1]}], tokenizer)
    long = {"messages": [{"role": "user", "content": "word " * 200}, PAIR[1]]}
    with pytest.raises(DataError, match=r"a.jsonl:21: its answer is cut to nothing"):
        conversations(path, [*rows_of(*many), long], tokenizer)
    jinja = tmp_path / "raises.jinja"
    jinja.write_text("{%- if '7' in messages[-1].content %}{{ raise_exception('no') }}{% endif -%}")
    jinja.write_text(jinja.read_text() + M32)
    with pytest.raises(DataError, match=r"^data.bad_rows=.*a.jsonl:8: .*the template refuses it"):
        conversations(path, rows_of(*many), tokenizer, template=str(jinja))


@pytest.mark.parametrize(
    "text, rule",
    [
        ("{% if %}", "cannot be used: TemplateSyntaxError: "),
        ("{{ messages[9].content.x }}", "cannot be used: UndefinedError: "),
        ("{{ raise_exception('no') }}", "fails on all 20 rows of .*: the template refuses it: no"),
        ("hello", "fails on all 20 rows of .*: the template changes an answer"),
    ],
)
def test_a_broken_template_is_told_by_its_own_key(
    tmp_path: Path, tokenizer: Tokenizer, text: str, rule: str
):
    jinja = tmp_path / "broken.jinja"
    jinja.write_text(text)
    with pytest.raises(DataError, match=rf"^sft\.template={jinja}: {rule}") as caught:
        many = [f"answer {i}" for i in range(20)]
        conversations(tmp_path / "a.jsonl", rows_of(*many), tokenizer, template=str(jinja))
    assert "\n" not in str(caught.value) and str(caught.value).count("=") == 1
    with pytest.raises(RecipeError, match=r"^sft\.template=.*: cannot be read: No such file"):
        chat_template(SftConfig(template=f"{jinja}x"), tokenizer, None)


def test_a_template_may_want_a_system_message(tokenizer: Tokenizer, tmp_path: Path):
    jinja = tmp_path / "system.jinja"
    jinja.write_text("{%- if messages[0].role != 'system' %}{{ 1 + none }}{% endif -%}" + M32)
    with chat_template(SftConfig(template=str(jinja)), tokenizer, None) as template:
        assert template.prompt([{"role": "system", "content": "a"}]) == "a<sep>"


def test_sources_are_told_by_their_own_keys(tmp_path: Path, tokenizer: Tokenizer):
    data = DataConfig()
    gone, empty = str(tmp_path / "gone.jsonl"), tmp_path / "empty.jsonl"
    empty.write_text("")
    with chat_template(SftConfig(), tokenizer, None) as template:
        maker = Maker(tokenizer, template, 64)

        def sft(source: str):
            section = SftConfig(source=(source,))
            kinds = {"most_tokens": 64, "is_shown": False}
            return open_conversations(section, data, tokenizer, template, **kinds)

        opened = {
            "sft": sft,
            "dpo": lambda source: open_pairs(source, (), 1, data, maker, seed=0),
            "grpo": lambda source: open_prompts(
                source, (), 1, data, maker, seed=0, reward="f.py:f"
            ),
        }
        for key, open_source in opened.items():
            rule = f"^{key}.source={gone}: does not exist; name a folder, a glob or tasks$"
            with pytest.raises(DataError, match=rule):
                open_source(gone)
            with pytest.raises(DataError, match=f"^{key}.source={empty}: no usable row in 1 rows"):
                open_source(str(empty))


def test_a_prompt_that_the_template_refuses_is_a_bad_row(tmp_path: Path, tokenizer: Tokenizer):
    path, jinja = tmp_path / "prompts.jsonl", tmp_path / "refuses.jinja"
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(40)))
    jinja.write_text("{%- if '7' in messages[0].content %}{{ raise_exception('no') }}{% endif -%}")
    jinja.write_text(jinja.read_text() + M32)
    data = DataConfig(max_bad_fraction=0.2, eval_fraction=0.3)
    with chat_template(SftConfig(template=str(jinja)), tokenizer, None) as template:
        maker, bad = Maker(tokenizer, template, 64), BadSeen()
        kinds = {"seed": 0, "reward": "mine.py:f", "on_bad": bad}
        sides = open_prompts(str(path), (), 1, data, maker, **kinds)
        assert len(sides.train) + len(sides.held_out) == 40 - 4 and bad.count == 4
        first = f"4 bad rows left out, first {path}:8: the template refuses it: no; leave it out"
        assert bad.told == f"{first}; `ptm data check` lists all"
        missing = "'answer' is missing or blank, and grpo.reward=exact compares with it"
        with pytest.raises(DataError, match=missing):
            open_prompts(str(path), (), 1, data, maker, seed=0, reward="exact")


def test_long_answers_are_cut_and_counted(tmp_path: Path, tokenizer: Tokenizer):
    rows = rows_of(*(f"answer {i}" for i in range(20)), "word " * 200)
    found = conversations(tmp_path / "a.jsonl", rows, tokenizer)
    both = found.train + found.held_out
    assert found.num_cut == 1 and len(both) == 21
    cut = next(one for one in both if len(one.tokens) == 64)
    assert cut.learned[-1] and cut.tokens[-1] != tokenizer.eod_id


def test_packed_rows_hold_each_document_once_with_its_own_labels(tokenizer: Tokenizer):
    asked = examples(EXACT, 60, seed=3, held_out=False)
    with ChatTemplate("m32") as template:
        encoded = [template.encode(one.messages(), tokenizer) for one in asked]
    from ptm.data.conversations import Conversation
    from ptm.data.sft import Encoded

    documents = [Encoded(*pair, Conversation("", [])) for pair in encoded]
    rows = PackedRows(documents, seq_len=96, seed=5, filler_id=tokenizer.eod_id, num_soft=2)
    batch = rows.batch(0, rows.num_rows)
    seen = []
    for b in range(rows.num_rows):
        for number in range(int(batch.document_ids[b].max()) + 1):
            here = batch.document_ids[b] == number
            ids = batch.input_ids[b][here].tolist()
            assert ids[:2] == [-1, -2]
            labels, mask = batch.labels[b][here], batch.loss_mask[b][here]
            assert batch.position_ids[b][here].tolist() == list(range(len(ids)))
            answer = tokenizer.decode(labels[mask].tolist())
            assert int(labels[mask][-1]) == tokenizer.eod_id  # the end of turn is learned
            assert not mask[:2].any()
            question = tokenizer.decode(ids[2:])
            seen.append((question[: question.index(answer)] if answer in question else "", answer))
            tokens = [*ids[2:], int(labels[-1])]
            assert any(np.array_equal(tokens, one.tokens) for one in documents)
    assert sorted(answer for _, answer in seen) == sorted(one.answer for one in asked)
    filler = batch.document_ids == -1
    assert not batch.loss_mask[filler].any()
    assert rows.num_learned(0, rows.num_rows) == int(batch.loss_mask.sum())


def test_a_step_is_the_same_rows_on_any_ranks(tokenizer: Tokenizer):
    with ChatTemplate("m32") as template:
        pairs = examples(EXACT, 40, seed=3, held_out=False)
        encoded = [template.encode(one.messages(), tokenizer) for one in pairs]
    from ptm.data.conversations import Conversation
    from ptm.data.sft import Encoded

    documents = [Encoded(*pair, Conversation("", [])) for pair in encoded]
    rows = PackedRows(documents, seq_len=64, seed=5, filler_id=0)

    def ids(world: int, size: int):
        loaders = [
            Loader(rows, rows_per_step=5, rank=r, world=world, micro_batch_size=size)
            for r in range(world)
        ]
        found = [b.input_ids for one in loaders for b in one.micro_batches(7)]
        return np.concatenate(found)

    assert all(np.array_equal(ids(1, 5), ids(*cell)) for cell in [(2, 1), (3, 2), (2, 4)])


def test_task_questions_are_split_and_repeat():
    train = examples(EXACT, 400, seed=0, held_out=False)
    assert train == examples(EXACT, 400, seed=0, held_out=False)
    held_out = examples(EXACT, 100, seed=9, held_out=True)
    assert not {one.question for one in train} & {one.question for one in held_out}
    for one in train[:50]:
        if one.task == "add":
            words = one.question.rstrip("?").split()
            assert int(words[2]) + int(words[4]) == int(one.answer)
    with pytest.raises(RecipeError, match=r"^sft\.tasks=add: has only"):
        examples(("add",), 10_000, seed=0, held_out=False)


def test_the_section_names_every_task():
    assert tuple(TASKS) == TASK_NAMES
