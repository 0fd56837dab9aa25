"""Conversations -> packed rows for supervised fine-tuning.

    encoded    tokens, and which of them are learned: by the chat template (ptm/data/chat.py)
    cut        a conversation longer than a row keeps its first seq_len + 1 tokens; where no answer
               is left of it, it is a bad row. Both are counted and said
    split      by a hash of the messages, as documents are (ptm/data/vocabulary.py)
    packed     once, first fit in hashed order; an epoch then takes the rows in an order of its own

A row holds whole conversations, each a document to the model: positions restart, and with
model.isolate_documents none sees another. Within a document of T tokens the inputs are the first
T - 1 and the labels the last; what is left of a row is filler. So a row is a pure function of
(seed, row number), like those of text, and ptm/data/loader.py serves both.

Soft tokens (prompt tuning) are positions before each document whose ids are -1, -2, ...: the model
puts its learned vectors there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ptm.common.errors import DataError, RecipeError, line
from ptm.data.chat import TEMPLATES, ChatTemplate, TemplateError, reason_of
from ptm.data.config import DataConfig
from ptm.data.conversations import Conversation, OnBad, ignore, read_conversations
from ptm.data.loader import RowId
from ptm.data.mixture import permutation
from ptm.data.pack import Batch
from ptm.data.prepare import refuse_bad
from ptm.data.progress import ThingsDone
from ptm.data.sft_config import TASK_SOURCE, SftConfig
from ptm.data.shard import Totals, text_hash
from ptm.data.tasks import examples
from ptm.data.tokenizer import Tokenizer
from ptm.data.vocabulary import is_held_out

OPEN_ROWS = 64
"""Rows that packing looks at for room."""
FILLER = -1


class Encoded(NamedTuple):
    """A conversation's tokens (T,) int64, which of them are learned (T,) bool, and the rest."""

    tokens: np.ndarray
    learned: np.ndarray
    conversation: Conversation


class Conversations(NamedTuple):
    """Both sides of the split, encoded, and how many rows were cut."""

    train: list[Encoded]
    held_out: list[Encoded]
    num_cut: int


def open_conversations(
    sft: SftConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    most_tokens: int,
    is_shown: bool,
    on_bad: OnBad = ignore,
) -> Conversations:
    """Read, encode, cut and split. most_tokens: of a conversation; is_shown: a progress bar;
    on_bad: is told each bad row.

    Raises: DataError, naming file and line of a row.
    """
    sides: tuple[list[Encoded], list[Encoded]] = ([], [])
    num_cut = 0
    for source in sft.source:
        found, held_out = _read(source, sft, data, is_shown, on_bad)
        totals, bad, faults = Totals(), [], []
        with ThingsDone(f"encoding {source}", len(found), is_shown=is_shown) as bar:
            for conversation, is_out in zip(found, held_out):
                bar.advance(1)
                one = _encode(conversation, tokenizer, template, most_tokens)
                if isinstance(one, DataError):
                    totals = totals.plus(Totals(bad_rows=1))
                    path, _, number = conversation.where.rpartition(":")
                    reason = " ".join(reason_of(one).split())
                    bad = bad or [(path, number, reason)]
                    on_bad(conversation.where, reason, 1)
                    faults += [one.rule] if isinstance(one, TemplateError) else []
                    continue
                totals = totals.plus(Totals(documents=1))
                num_cut += len(one.tokens) < len(one.learned)
                sides[is_out].append(one._replace(learned=one.learned[: len(one.tokens)]))
        if len(faults) == len(found) > 0:
            raise template.refusal(f"fails on all {len(found)} rows of {source}: {faults[0]}")
        refuse_bad(data, source, totals, bad, "sft.source")
    for name, side in zip(("training", "held-out"), sides):
        if not side:
            rule = f"leaves no conversation on the {name} side"
            remedy = "add conversations, or change data.eval_fraction"
            raise DataError(line("sft.source", ",".join(sft.source), rule, remedy))
    return Conversations(*sides, num_cut)


def _read(
    source: str, sft: SftConfig, data: DataConfig, is_shown: bool, on_bad: OnBad
) -> tuple[list[Conversation], list[bool]]:
    """Conversations of a source, and which of them are held out."""
    if source == TASK_SOURCE:
        sides = [(False, sft.task_rows), (True, max(64, sft.task_rows // 16))]
        found = [
            (Conversation(f"{TASK_SOURCE}:{i + 1}", example.messages()), is_out)
            for is_out, count in sides
            for i, example in enumerate(examples(sft.tasks, count, seed=0, held_out=is_out))
        ]
        return [one for one, _ in found], [is_out for _, is_out in found]
    read = read_conversations(source, data, is_shown=is_shown, on_bad=on_bad)
    hashes = [text_hash(json.dumps(one.messages, sort_keys=True).encode()) for one in read]
    return read, [bool(is_held_out(one, data.eval_fraction)) for one in hashes]


def _encode(
    conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate, most_tokens: int
) -> Encoded | DataError:
    """Cut tokens with the mask of all, or why there are none."""
    try:
        tokens, learned = template.encode(conversation.messages, tokenizer)
    except DataError as error:
        return error
    kept = tokens[:most_tokens]
    if not learned[1 : len(kept)].any():
        return DataError(
            f"its answer is cut to nothing: it begins after {most_tokens} tokens, "
            "the longest that train.seq_len holds"
        )
    return Encoded(kept, learned, conversation)


def chat_template(sft: SftConfig, tokenizer: Tokenizer, folder: Path | None) -> ChatTemplate:
    """The recipe's template, else that beside the tokenizer in `folder`, else m32's.

    Raises: RecipeError where there is none, DataError where it is broken.
    """
    source, name = sft.template, sft.template
    if source is None and folder is not None:
        source, name = _own_template(folder), str(folder)
    if source is None and tokenizer.sep_id is not None:
        source = name = "m32"
    if source is None:
        rule = "is not set, and the tokenizer has neither a template nor <sep>"
        remedy = f"give {', '.join(TEMPLATES)} or a .jinja file"
        raise RecipeError(line("sft.template", None, rule, remedy))
    if sft.template is not None and source not in TEMPLATES:
        try:
            source = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            remedy = f"give {', '.join(TEMPLATES)} or a .jinja file"
            raise RecipeError(
                line("sft.template", source, f"cannot be read: {why}", remedy)
            ) from error
    eos = next(name for name, i in tokenizer.specials.items() if i == tokenizer.eod_id)
    template = ChatTemplate(source, name=str(name), eos_token=eos)
    try:
        template.check()
    except DataError:
        template.close()
        raise
    return template


def _own_template(folder: Path) -> str | None:
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except (OSError, ValueError) as error:
        rule = f"cannot be read ({error})"
        raise DataError(line("sft.template", folder, rule, "give one, or mend it")) from error
    template = found.get("chat_template") if isinstance(found, dict) else None
    return template if isinstance(template, str) else None


@dataclass(frozen=True)
class Place:
    """A document of a packed row: which one, and its first position."""

    document: int
    start: int


class PackedRows:
    """Rows of conversations by number; `batch` is what ptm/data/loader.py asks for."""

    def __init__(
        self, documents: Sequence[Encoded], *, seq_len: int, seed: int, filler_id: int, num_soft=0
    ) -> None:
        """num_soft: soft tokens before each document. filler_id: of positions without one."""
        self.documents, self.seq_len, self.seed = documents, seq_len, seed
        self.filler_id, self.num_soft = filler_id, num_soft
        lengths = [len(one.tokens) - 1 + num_soft for one in documents]
        self.rows = _first_fit(lengths, seq_len, permutation(len(documents), seed, 0))
        self.learned = [
            sum(int(documents[place.document].learned[1:].sum()) for place in row)
            for row in self.rows
        ]

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self.rows)

    def locate(self, index: int) -> RowId:
        """Row `index` of the endless order: which row of which epoch."""
        epoch, index = divmod(index, self.num_rows)
        return RowId(0, epoch, int(permutation(self.num_rows, self.seed, 1, epoch)[index]))

    def num_learned(self, start: int, stop: int) -> int:
        """Labels with loss in rows [start, stop)."""
        return sum(self.learned[self.locate(i).row] for i in range(start, stop))

    def batch(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the order; none gives a batch of no rows."""
        shape = (stop - start if stop > start else 0, self.seq_len)
        ids = np.full(shape, self.filler_id, np.int64)
        labels, positions = ids.copy(), np.zeros(shape, np.int64)
        documents = np.full(shape, FILLER, np.int64)
        mask = np.zeros(shape, bool)
        soft = -1 - np.arange(self.num_soft)
        for b in range(shape[0]):
            for number, place in enumerate(self.rows[self.locate(start + b).row]):
                one = self.documents[place.document]
                whole = np.concatenate([soft, one.tokens])
                last = place.start + len(whole) - 1
                ids[b, place.start : last] = whole[:-1]
                labels[b, place.start : last] = whole[1:]
                mask[b, last - len(one.tokens) + 1 : last] = one.learned[1:]
                positions[b, place.start : last] = np.arange(len(whole) - 1)
                documents[b, place.start : last] = number
        labels = np.maximum(labels, 0)  # soft tokens are nobody's label
        parts = (ids, labels, mask, positions, documents)
        return Batch(*(torch.from_numpy(part) for part in parts))


def _first_fit(lengths: Sequence[int], seq_len: int, order: Any) -> list[list[Place]]:
    rows: list[list[Place]] = []
    used: list[int] = []
    opened: list[int] = []
    for document in order.tolist():
        length = lengths[document]
        row = next((r for r in opened if used[r] + length <= seq_len), None)
        if row is None:
            row = len(rows)
            rows.append([])
            used.append(0)
            opened = [*opened[-OPEN_ROWS + 1 :], row]
        rows[row].append(Place(document, used[row]))
        used[row] += length
    return rows
