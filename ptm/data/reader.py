"""Streams the documents of one file, or of a piece of it, in bounded memory; bad ones too.

Every document comes out as `Document`, and what cannot be one as `Bad` with its line and the
reason, in the file's order, so whoever reads can count both exactly. Taken as they are: a byte
order mark, CRLF line ends, blank lines between rows, keys beside the text. A damaged archive yields
what comes before the damage.

Not here: what is done about bad rows (ptm/data/prepare.py), and ids that occur twice, which only
someone who has seen every file can know (ptm/data/job.py).
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import zstandard

from ptm.common.errors import StorageError, line
from ptm.data.source import Piece

MAX_TEXT_BYTES = 64 << 20
"""Longest line or text file that is read; a longer one is skipped without holding it."""
MAX_SKIP_BYTES = 4 << 30
"""Where skipping one line gives up on the rest of its file: that is a decompression bomb."""


class Document(NamedTuple):
    """A text; `line` counts from 1 within the piece."""

    line: int
    text: str
    id: str | None = None


class Bad(NamedTuple):
    """`num_rows` rows from `line` on that are not usable text."""

    line: int
    reason: str
    num_rows: int = 1


class Reader:
    """Iterate once over a piece; afterwards `lines` says how many lines (or rows) it had.

    `consumed_bytes` grows meanwhile and serves progress bars only.
    Raises: StorageError when the disk fails. All that is wrong with the content is a `Bad`.
    """

    def __init__(self, piece: Piece, text_key: str) -> None:
        self.piece = piece
        self.text_key = text_key
        self.lines = 0
        self.consumed_bytes = 0

    def __iter__(self) -> Iterator[Document | Bad]:
        file = self.piece.file
        if file.broken or not file.size_bytes:
            self.lines = 1
            yield Bad(1, file.broken or "empty file")
            return
        try:
            if file.suffix == ".parquet":
                yield from self._parquet()
            elif file.suffix in (".txt", ".py"):
                yield from self._whole_file()
            else:
                yield from self._json_lines()
        except (PermissionError, FileNotFoundError) as e:
            yield Bad(self.lines + 1, f"cannot be opened: {e.strerror}")
        except OSError as e:
            raise StorageError(line("file", file.path, f"{e}", "check the disk, then retry")) from e
        self.consumed_bytes = self.piece.size_bytes

    def _whole_file(self) -> Iterator[Document | Bad]:
        self.lines = 1
        with open(self.piece.file.path, "rb") as f:
            content = f.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            yield Bad(1, f"longer than {MAX_TEXT_BYTES >> 20} MiB, and a text file is one document")
            return
        try:
            text = content.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as e:
            yield Bad(content.count(b"\n", 0, e.start) + 1, f"not UTF-8 at byte {e.start}")
            return
        reason = unusable(text)
        yield Bad(1, reason) if reason else Document(1, text)

    def _json_lines(self) -> Iterator[Document | Bad]:
        piece = self.piece
        with open(piece.file.path, "rb") as raw:
            stream = _decompressed(raw, piece.file.suffix)
            if piece.start:  # a line belongs to the piece that holds its first byte
                raw.seek(piece.start - 1)
                _skip_line(raw)
            while True:
                self.consumed_bytes = raw.tell() - piece.start
                if 0 <= piece.stop <= piece.start + self.consumed_bytes:
                    return
                try:
                    content = stream.readline(MAX_TEXT_BYTES + 1)
                    is_whole = len(content) <= MAX_TEXT_BYTES
                    ends = is_whole or content.endswith(b"\n") or _skip_line(stream)
                except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
                    self.lines += 1
                    yield Bad(self.lines, f"damaged {piece.file.suffix} file: {e}")
                    return
                if not content:
                    return
                self.lines += 1
                if self.lines == 1 and piece.start == 0:
                    content = content.removeprefix(b"\xef\xbb\xbf")
                if not ends:
                    yield Bad(self.lines, "line without end; the rest of the file is left out")
                    return
                if not is_whole:
                    yield Bad(self.lines, f"line longer than {MAX_TEXT_BYTES >> 20} MiB")
                elif content and not content.isspace():
                    yield self._json_line(content)

    def _json_row(self, content: bytes) -> dict[str, Any] | Bad:
        try:
            row = json.loads(content.decode())
        except UnicodeDecodeError as e:
            return Bad(self.lines, f"not UTF-8 at byte {e.start} of the line")
        except RecursionError:
            return Bad(self.lines, "not JSON: nested too deep")
        except ValueError as e:
            return Bad(self.lines, f"not JSON: {e}")
        if not isinstance(row, dict):
            return Bad(self.lines, f"not a JSON object but {_kind(row)}")
        return row

    def _json_line(self, content: bytes) -> Document | Bad:
        row = self._json_row(content)
        if isinstance(row, Bad):
            return row
        if self.text_key not in row:
            return Bad(self.lines, f"no key {self.text_key!r}")
        text, identity = row[self.text_key], row.get("id")
        if not isinstance(text, str):
            return Bad(self.lines, f"{self.text_key!r} is {_kind(text)}, not a string")
        reason = unusable(text)
        if reason:
            return Bad(self.lines, reason)
        return Document(self.lines, text, None if identity is None else str(identity))

    def _parquet(self) -> Iterator[Document | Bad]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.piece.file.path) as file:
                groups = range(file.num_row_groups)[self.piece.start : self.piece.stop]
                num_rows = sum(file.metadata.row_group(i).num_rows for i in groups)
                wrong, columns = self._wrong_columns(file.schema_arrow)
                if wrong:
                    self.lines = num_rows
                    yield Bad(1, wrong, max(num_rows, 1))
                    return
                for batch in file.iter_batches(256, row_groups=list(groups), columns=columns):
                    yield from self._parquet_batch(batch)
                    self.consumed_bytes = self.piece.size_bytes * self.lines // max(num_rows, 1)
        except (pa.ArrowException, OSError) as e:
            if isinstance(e, OSError) and e.errno is not None:  # the disk's, not the file's
                raise
            self.lines += 1
            yield Bad(self.lines, f"damaged .parquet file: {str(e).splitlines()[0][:200]}")

    def _wrong_columns(self, schema: Any) -> tuple[str, list[str]]:
        """What is wrong with the columns, and those to read."""
        columns = [c for c in ("id", self.text_key) if c in schema.names]
        return _wrong_column(schema, self.text_key), columns

    def _parquet_batch(self, batch: Any) -> Iterator[Document | Bad]:
        import pyarrow as pa

        column = batch.column(self.text_key)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        ids = batch.column("id").to_pylist() if "id" in batch.schema.names else [None] * len(batch)
        # As bytes, because parquet files in the wild hold strings that are not UTF-8.
        for content, identity in zip(column.cast(pa.large_binary()).to_pylist(), ids):
            self.lines += 1
            if content is None:
                yield Bad(self.lines, f"{self.text_key!r} is null, not a string")
                continue
            try:
                text = content.decode()
                reason = unusable(text)
            except UnicodeDecodeError as e:
                text, reason = "", f"not UTF-8 at byte {e.start}"
            identity = None if identity is None else str(identity)
            yield Bad(self.lines, reason) if reason else Document(self.lines, text, identity)


def unusable(text: str) -> str:
    """Why a text cannot be a document; empty when it can."""
    if not text or text.isspace():
        return "empty text"
    if "\0" in text:
        return f"NUL character at {text.index(chr(0))}"
    if len(text) > MAX_TEXT_BYTES:
        return f"longer than {MAX_TEXT_BYTES >> 20} MiB"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as e:
            return f"half a surrogate pair at {e.start}, which is not Unicode text"
    return ""


def _wrong_column(schema: Any, key: str) -> str:
    import pyarrow as pa

    if schema.names.count(key) != 1:
        return f"no column {key!r}"
    kind = schema.field(key).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return ""
    return f"column {key!r} is {kind}, not a string"


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".jsonl.gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if suffix == ".jsonl.zst":
        return io.BufferedReader(_ZstdFile(raw), 1 << 17)
    return raw


class _ZstdFile(io.RawIOBase):
    """Like zstandard's stream_reader, which however ends a truncated file in silence."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.frame: Any = None
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            compressed = b""
            if self.frame is not None and self.frame.eof:
                compressed, self.frame = self.frame.unused_data, None
            # 1 KiB at a time: four bytes can stand for 128 KiB, and all of it comes out at once.
            compressed = compressed or self.raw.read(1 << 10)
            if not compressed:
                if self.frame is not None:
                    raise EOFError("it ends in the middle")
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.ready = memoryview(self.frame.decompress(compressed))
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count


def _skip_line(stream: IO[bytes]) -> bool:
    # Whether the line, or the file, ended within MAX_SKIP_BYTES.
    skipped = 0
    while skipped < MAX_SKIP_BYTES:
        content = stream.readline(1 << 20)
        if not content or content.endswith(b"\n"):
            return True
        skipped += len(content)
    return False


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
