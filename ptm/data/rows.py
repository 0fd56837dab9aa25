"""Rows of .jsonl and .parquet as dictionaries, for data that is more than one text: conversations,
preferences, prompts. Formats, limits and the ways of being bad are those of ptm/data/reader.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ptm.data.reader import Bad, Document, Reader
from ptm.data.source import Piece


class Row(NamedTuple):
    """One row; `line` counts from 1 within the piece."""

    line: int
    values: dict[str, Any]


class RowReader(Reader):
    """Iterate once over a piece: a `Row` or a `Bad` each."""

    def __init__(self, piece: Piece) -> None:
        super().__init__(piece, "")

    def __iter__(self) -> Iterator[Row | Bad]:  # type: ignore[override]
        return super().__iter__()  # type: ignore[return-value]

    def _whole_file(self) -> Iterator[Document | Bad]:
        self.lines = 1
        yield Bad(1, "a text file has no rows; give .jsonl or .parquet")

    def _json_line(self, content: bytes) -> Any:
        row = self._json_row(content)
        return row if isinstance(row, Bad) else Row(self.lines, row)

    def _wrong_columns(self, schema: Any) -> tuple[str, list[str]]:
        return "", list(schema.names)

    def _parquet_batch(self, batch: Any) -> Iterator[Any]:
        for values in batch.to_pylist():
            self.lines += 1
            yield Row(self.lines, values)
