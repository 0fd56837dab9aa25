"""Rows for learning from answers: preference pairs, and prompts whose answers a reward scores.

    pairs      {"prompt": ..., "chosen": ..., "rejected": ...}
    prompts    {"prompt": ..., "answer": ...}, the answer for the reward, "" without one where the
               reward does not compare with it

from .jsonl or .parquet, or made of the built-in tasks: a rejected answer is then the right answer
to another question of its task. Rows that cannot be used are bad rows, by data.bad_rows, told by
file and line; the split is by a hash of the prompt, so a prompt is on one side only.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import xxhash

from ptm.common.errors import CheckpointError, DataError, line
from ptm.data.chat import ChatTemplate, reason_of
from ptm.data.config import DataConfig
from ptm.data.conversations import BadRow, OnBad, ignore, read_rows
from ptm.data.loader import RowId
from ptm.data.mixture import permutation
from ptm.data.pack import Batch
from ptm.data.reader import unusable
from ptm.data.rewards import BUILT_IN
from ptm.data.shard import text_hash
from ptm.data.tasks import Example, examples
from ptm.data.tokenizer import Tokenizer
from ptm.data.vocabulary import is_held_out

TASK_SOURCE = "tasks"
Made = TypeVar("Made")


class Answer(NamedTuple):
    """A prompt with an answer and its end: tokens (T,) int64, and which of them are the answer."""

    tokens: np.ndarray
    learned: np.ndarray

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: int(self.learned.argmax())].tolist()


class Pair(NamedTuple):
    where: str
    chosen: Answer
    rejected: Answer


class Prompt(NamedTuple):
    where: str
    question: str
    answer: str
    ids: list[int]


class Sides(NamedTuple):
    """Both sides of the split: pairs, or prompts."""

    train: list[Any]
    held_out: list[Any]


class Maker(NamedTuple):
    """What rows are encoded with; most_tokens: longer rows are bad."""

    tokenizer: Tokenizer
    template: ChatTemplate
    most_tokens: int

    def pair(self, where: str, prompt: str, chosen: str, rejected: str) -> Pair:
        if chosen == rejected:
            raise BadRow("chosen and rejected are equal")
        return Pair(where, self._answer(prompt, chosen), self._answer(prompt, rejected))

    def prompt(self, where: str, question: str, answer: str) -> Prompt:
        message = [{"role": "user", "content": question}]
        try:
            ids = self.template.encode_prompt(message, self.tokenizer)
        except DataError as error:
            raise BadRow(reason_of(error)) from error
        self._refuse_long(len(ids))
        return Prompt(where, question, answer, ids)

    def _answer(self, prompt: str, answer: str) -> Answer:
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
        try:
            found = Answer(*self.template.encode(messages, self.tokenizer))
        except DataError as error:
            raise BadRow(reason_of(error)) from error
        self._refuse_long(len(found.tokens))
        return found

    def _refuse_long(self, length: int) -> None:
        if length > self.most_tokens:
            raise BadRow(f"takes {length} tokens, and a row has room for {self.most_tokens}")


def open_pairs(
    source: str,
    tasks: Sequence[str],
    count: int,
    data: DataConfig,
    maker: Maker,
    *,
    seed: int,
    on_bad: OnBad = ignore,
) -> Sides:
    """Preference pairs of a file, or `count` of the built-in tasks. Raises: DataError."""

    def of_row(values: dict[str, Any]) -> tuple[str, Callable[[str], Pair]]:
        texts = _texts(values, ("prompt", "chosen", "rejected"))
        return texts[0], lambda where: maker.pair(where, *texts)

    def of_task(found: list[Example]) -> list[Pair]:
        draw = random.Random(seed)
        by_task: dict[str, list[str]] = {}
        for one in found:
            by_task.setdefault(one.task, []).append(one.answer)
        made = []
        for one in found:
            others = [a for a in dict.fromkeys(by_task[one.task]) if a != one.answer]
            if others:
                rejected = draw.choice(others)
                made.append(maker.pair(one.task, one.question, one.answer, rejected))
        return made

    return _open("dpo", source, tasks, count, data, of_row, of_task, seed, on_bad)


def open_prompts(
    source: str,
    tasks: Sequence[str],
    count: int,
    data: DataConfig,
    maker: Maker,
    *,
    seed: int,
    reward: str,
    on_bad: OnBad = ignore,
) -> Sides:
    """Prompts of a file, or `count` of the built-in tasks, for the named reward. Raises:
    DataError."""

    def of_row(values: dict[str, Any]) -> tuple[str, Callable[[str], Prompt]]:
        answer = values.get("answer")
        text = {"prompt": values.get("prompt"), "answer": "" if answer is None else answer}
        if not isinstance(text["answer"], str):
            raise BadRow("'answer' is not a string")
        if reward in BUILT_IN and not text["answer"].strip():
            raise BadRow(f"'answer' is missing or blank, and grpo.reward={reward} compares with it")
        prompt = _texts(text, ("prompt",))[0]
        return prompt, lambda where: maker.prompt(where, prompt, text["answer"])

    def of_task(found: list[Example]) -> list[Prompt]:
        return [maker.prompt(one.task, one.question, one.answer) for one in found]

    return _open("grpo", source, tasks, count, data, of_row, of_task, seed, on_bad)


def _open(
    section: str,
    source: str,
    tasks: Sequence[str],
    count: int,
    data: DataConfig,
    of_row: Callable[[dict[str, Any]], tuple[str, Callable[[str], Made]]],
    of_task: Callable[[list[Example]], list[Made]],
    seed: int,
    on_bad: OnBad,
) -> Sides:
    if source == TASK_SOURCE:
        draw = functools.partial(examples, tasks, seed=seed, key=f"{section}.tasks")
        try:
            return Sides(
                of_task(draw(count, held_out=False)),
                of_task(draw(max(count // 8, 8), held_out=True)),
            )
        except BadRow as error:
            remedy = "raise train.seq_len, or choose other tasks"
            raise DataError(line(f"{section}.tasks", tasks, str(error), remedy)) from error
    sides = Sides([], [])

    def take(values: dict[str, Any]) -> Any:
        prompt, make = of_row(values)
        is_out = is_held_out(text_hash(prompt.encode()), max(data.eval_fraction, 1e-9))
        return bool(is_out), make("")

    key = f"{section}.source"
    rows = read_rows(source, data, key=key, is_shown=False, take=take, on_bad=on_bad)
    for where, (is_out, made) in rows:
        sides[is_out].append(made._replace(where=where))
    for name, side in zip(("train", "held-out"), sides):
        if not side:
            remedy = "add rows, or change data.eval_fraction"
            raise DataError(line(key, source, f"has no row on the {name} side", remedy))
    return sides


def _texts(values: dict[str, Any], keys: Sequence[str]) -> list[str]:
    for key in keys:
        text = values.get(key)
        if not isinstance(text, str):
            raise BadRow(f"{key!r} is missing or not a string")
        if reason := unusable(text):
            raise BadRow(f"{key!r}: {reason}")
    return [values[key] for key in keys]


def padded(answers: Sequence[Answer], filler_id: int) -> Batch:
    """Rows of one document each, padded on the right to the longest."""
    L = max((len(a.tokens) for a in answers), default=2) - 1
    B = len(answers)
    ids, labels = np.full((2, B, L), filler_id, np.int64)
    mask = np.zeros((B, L), bool)
    documents = np.full((B, L), -1, np.int64)
    for i, answer in enumerate(answers):
        n = len(answer.tokens) - 1
        ids[i, :n], labels[i, :n] = answer.tokens[:-1], answer.tokens[1:]
        mask[i, :n], documents[i, :n] = answer.learned[1:], 0
    positions = np.broadcast_to(np.arange(L), (B, L)).copy()
    return Batch(*(torch.from_numpy(a) for a in (ids, labels, mask, positions, documents)))


class Order:
    """An endless order of rows: each once an epoch, in an order of the epoch's own."""

    def __init__(self, rows: Sequence[Any], seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch: tuple[int, np.ndarray] | None = None

    def locate(self, index: int) -> RowId:
        epoch, place = divmod(index, len(self.rows))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, permutation(len(self.rows), self.seed, epoch)
        return RowId(0, epoch, int(self._epoch[1][place]))

    def batch(self, start: int, stop: int) -> list[int]:
        """Numbers of the rows [start, stop) of the order."""
        return [self.locate(i).row for i in range(start, stop)]


class Reference:
    """Log-probabilities of every answer's tokens under the initial weights: made once, before the
    first step, and kept in the run folder, so that no second model is held."""

    def __init__(self, path: Path, pairs: Sequence[Pair]) -> None:
        self.path = path
        digest = xxhash.xxh3_128()
        for pair in pairs:
            for answer in (pair.chosen, pair.rejected):
                digest.update(answer.tokens.tobytes())
                digest.update(answer.learned.tobytes())
        self.fingerprint = digest.digest()
        lengths = [len(a.tokens) - 1 for p in pairs for a in (p.chosen, p.rejected)]
        self.ends = np.cumsum([0, *lengths])
        self.values = np.zeros(int(self.ends[-1]), np.float32)

    def put(self, answer: int, values: np.ndarray) -> None:
        """Keep those of one answer; answer 2 p is pair p's chosen, 2 p + 1 its rejected one."""
        start, stop = self.ends[answer], self.ends[answer + 1]
        self.values[start:stop] = values[: stop - start]

    def rows(self, numbers: Sequence[int], length: int) -> torch.Tensor:
        """(rows, length) fp32, 0 behind the end of each."""
        out = np.zeros((len(numbers), length), np.float32)
        for i, number in enumerate(numbers):
            start, stop = self.ends[number], self.ends[number + 1]
            out[i, : stop - start] = self.values[start:stop]
        return torch.from_numpy(out)

    def save(self) -> None:
        """16 bytes that tell the pairs, then the values as fp32, little-endian."""
        beside = self.path.with_suffix(".tmp")
        with open(beside, "wb") as file:
            file.write(self.fingerprint + self.values.astype("<f4").tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)

    def load(self) -> None:
        """Raises: CheckpointError where the file is missing or of other pairs."""
        remedy = "start a new run, as its weights are no longer the initial ones"
        try:
            content = self.path.read_bytes()
        except OSError as error:
            rule = f"cannot be read ({error.strerror})"
            raise CheckpointError(line("reference", self.path, rule, remedy)) from error
        size = len(self.fingerprint)
        if content[:size] != self.fingerprint or len(content) != size + 4 * len(self.values):
            raise CheckpointError(line("reference", self.path, "is of other pairs", remedy))
        self.values = np.frombuffer(content, "<f4", offset=size).copy()
