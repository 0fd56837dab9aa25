"""Conversations in the forms people have them, as one form: messages {role, content}.

    messages    {"messages": [{"role": "user", "content": ...}, ...]}
    ShareGPT    {"conversations": [{"from": "human", "value": ...}, ...]}, "system" beside it or not
    Alpaca      {"instruction": ..., "input": ..., "output": ...}, "system" and "history" or not

A conversation is at most one message of the system, then the user and the assistant in turns; it
begins with the user and ends with the assistant. Anything else is a bad row, told by file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ptm.common.errors import DataError, line
from ptm.data.config import DataConfig
from ptm.data.prepare import refuse_bad
from ptm.data.progress import BytesDone
from ptm.data.reader import Bad, unusable
from ptm.data.rows import Row, RowReader
from ptm.data.shard import Totals
from ptm.data.source import cut, find

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
WHOLE_FILE = 1 << 62

Messages = list[dict[str, str]]
OnBad = Callable[[str, str, int], None]
"""Is told `file:line`, why the row is bad, and how many rows from there on are."""


def ignore(where: str, reason: str, num_rows: int) -> None:
    """Bad rows are counted by who reads, and need no more."""


class BadSeen:
    """Counts the bad rows of a run's own sources and remembers the first."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def __call__(self, where: str, reason: str, num_rows: int) -> None:
        self.first = self.first or f"{where}: {reason}"
        self.count += num_rows

    @property
    def told(self) -> str:
        """A line for people, "" where there is none."""
        if not self.count:
            return ""
        rows = "row" if self.count == 1 else "rows"
        return f"{self.count:,} bad {rows} left out, first {self.first}; `ptm data check` lists all"


class Conversation(NamedTuple):
    """Messages, and where they are from: `file:line`, or the name of a task."""

    where: str
    messages: Messages


class BadRow(ValueError):
    """Why a row is no conversation."""


def messages_of(row: dict[str, Any]) -> Messages:
    """The messages of one row of any form. Raises: BadRow."""
    if "messages" in row or "conversations" in row:
        key = "messages" if "messages" in row else "conversations"
        turns = row[key]
        if not isinstance(turns, list) or not turns:
            raise BadRow(f"{key!r} is empty" if turns == [] else f"{key!r} is not a list")
        found = [_message(turn, i) for i, turn in enumerate(turns, start=1)]
        if isinstance(row.get("system"), str) and row["system"] and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": row["system"]})
    elif "instruction" in row and "output" in row:
        found = _alpaca(row)
    else:
        raise BadRow("has none of 'messages', 'conversations', or 'instruction' with 'output'")
    _check_order(found)
    return found


def _message(turn: Any, number: int) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise BadRow(f"message {number} is not an object")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow(f"message {number} has no role and content, or from and value, of text")
    return {"role": ROLES.get(role, role), "content": content}


def _alpaca(row: dict[str, Any]) -> Messages:
    texts = {k: row.get(k) or "" for k in ("system", "instruction", "input", "output")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise BadRow(f"{key!r} is not a string")
    found = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    for pair in row.get("history") or []:
        if not isinstance(pair, (list, tuple)) or [type(text) for text in pair] != [str, str]:
            raise BadRow("'history' is not a list of pairs of texts")
        found += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    question = "\n".join(filter(None, (texts["instruction"], texts["input"])))
    answer = {"role": "assistant", "content": texts["output"]}
    return [*found, {"role": "user", "content": question}, answer]


def _check_order(messages: Messages) -> None:
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) == first:
        raise BadRow("has no message but the system's")
    for i, message in enumerate(messages):
        number, role = i + 1, message["role"]
        wanted = "system" if i < first else ("user", "assistant")[(i - first) % 2]
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"message {number} has role {role!r}, not system, user or assistant")
        if role != wanted:
            raise BadRow(f"roles are out of order: message {number} is of {role!r}, not {wanted!r}")
        reason = unusable(message["content"])
        if reason:
            raise BadRow(f"message {number} of {role!r}: {reason}")
    if messages[-1]["role"] != "assistant":
        raise BadRow("ends without an answer of the assistant")


def read_rows(
    source: str,
    config: DataConfig,
    *,
    key: str,
    is_shown: bool,
    take: Any = messages_of,
    on_bad: OnBad = ignore,
) -> Iterator[tuple[str, Any]]:
    """`file:line` and what `take` makes of each row of a source, which `key` names; bad rows by
    data.bad_rows.

    `take` raises BadRow; `on_bad` is told each bad row. Raises: DataError at the end of the source
    where more rows are bad than the recipe accepts, or none is good.
    """
    totals, bad = Totals(), []
    files = find(source, key)
    with BytesDone(f"reading {source}", sum(f.size_bytes for f in files), is_shown=is_shown) as bar:
        for piece in cut(files, WHOLE_FILE):
            for row in RowReader(piece):
                reason = row.reason if isinstance(row, Bad) else None
                taken = None
                if isinstance(row, Row):
                    try:
                        taken = take(row.values)
                    except BadRow as error:
                        reason = str(error)
                if reason is not None:
                    num_rows = row.num_rows if isinstance(row, Bad) else 1
                    totals = totals.plus(Totals(bad_rows=num_rows))
                    bad = bad or [(piece.file.path, row.line, reason)]
                    on_bad(f"{piece.file.path}:{row.line}", reason, num_rows)
                    continue
                totals = totals.plus(Totals(documents=1))
                yield f"{piece.file.path}:{row.line}", taken
            bar.advance(piece.size_bytes)
    refuse_bad(config, source, totals, bad, key)


def read_conversations(
    source: str, config: DataConfig, *, is_shown: bool, on_bad: OnBad = ignore
) -> list[Conversation]:
    """All conversations of a source. Raises: DataError."""
    if source.endswith(".txt"):
        remedy = "give .jsonl or .parquet files, or `tasks`"
        raise DataError(line("sft.source", source, "holds no conversations", remedy))
    rows = read_rows(source, config, key="sft.source", is_shown=is_shown, on_bad=on_bad)
    return [Conversation(*row) for row in rows]
