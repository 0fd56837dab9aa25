"""Tokenizes pieces of source files into one shard: the work of one child process.

A shard is three files, complete when the third is there:

    shard-00003.tokens      ids of all documents, each ended by <eod>; uint16 or uint32
    shard-00003.documents   (num_documents, 3) uint64: hash of the text, number of tokens with the
                            <eod>, hash of the document's id (0 without one)
    shard-00003.json        what is in them: counts, sizes, checksums, and the bad rows

The hash of the text decides on which side of the held-out split a document is. It is kept, so the
share held out can be changed without tokenizing again.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ptm.common.env import set_default
from ptm.common.errors import DataError, line
from ptm.data.reader import Bad, Document, Reader
from ptm.data.source import File, Piece
from ptm.data.tokenizer import Tokenizer, load_tokenizer

FILES = (".tokens", ".documents")
DOCUMENT_COLUMNS = 3
MAX_BAD_SHOWN = 100
"""Bad rows a shard names; all are counted."""
BATCH_CHARACTERS = 1 << 20
PART_CHARACTERS = 1 << 20
"""Longer texts are encoded in parts, cut at line ends: encoders hold 100 bytes a character."""


class Totals(NamedTuple):
    """Counts that add up over shards."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    bad_rows: int = 0

    def plus(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(self, other)))


def handle(request: dict[str, Any], report: Callable[[Any], None]) -> Any:
    """What a `Child` runs: `write_shard`; reports the source bytes read since the last report."""
    set_default("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    pieces = [Piece(File(*file), *rest) for file, *rest in request["pieces"]]
    tokenizer = _tokenizer(request["tokenizer"])
    return write_shard(Path(request["shard"]), pieces, request["text_key"], tokenizer, report)


_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


def write_shard(
    shard: Path,
    pieces: list[Piece],
    text_key: str,
    tokenizer: Tokenizer,
    report: Callable[[int], None],
) -> dict[str, Any]:
    """Write the three files of `shard` (a path without suffix) and return what its .json says.

    Lines of bad rows count from the start of their piece; `lines` of each piece lets the parent,
    who knows the pieces before it, add them up.
    Raises: DataError when a source file changes under it; StorageError, OSError when a disk fails.
    """
    totals = Totals()
    bad: list[tuple[int, int, str]] = []
    lines: list[int] = []
    documents: list[tuple[int, int, int]] = []
    hasher = xxhash.xxh3_128()
    # Other builders can only be ones that were given up for dead; they write the same bytes.
    temporary = shard.with_suffix(f".tmp-{os.getpid()}")
    with open(temporary, "wb") as out:
        for i, piece in enumerate(pieces):
            reader = Reader(piece, text_key)
            reported = 0
            for texts, found in _batches(reader):
                for one in found:
                    bad += [(i, one.line, one.reason)][: MAX_BAD_SHOWN - len(bad)]
                    totals = totals.plus(Totals(bad_rows=one.num_rows))
                for document, ids in zip(texts, _encode([d.text for d in texts], tokenizer)):
                    content = document.text.encode()
                    tokens = np.array([*ids, tokenizer.eod_id], token_dtype(tokenizer.vocab_size))
                    out.write(tokens.data)
                    hasher.update(tokens.data)
                    documents.append((text_hash(content), len(tokens), _id_hash(document.id)))
                    totals = totals.plus(Totals(1, len(tokens), len(content)))
                report(reader.consumed_bytes - reported)
                reported = reader.consumed_bytes
            lines.append(reader.lines)
            _check_unchanged(piece.file)
    table = np.array(documents, np.uint64).reshape(-1, DOCUMENT_COLUMNS)
    temporary.rename(shard.with_suffix(".tokens"))
    temporary.write_bytes(table.tobytes())
    temporary.rename(shard.with_suffix(".documents"))
    summary = {
        **totals._asdict(),
        "lines": lines,
        "bad": bad,
        "size_bytes": {
            ".tokens": shard.with_suffix(".tokens").stat().st_size,
            ".documents": table.nbytes,
        },
        "xxh3": {
            ".tokens": hasher.hexdigest(),
            ".documents": xxhash.xxh3_128_hexdigest(table.tobytes()),
        },
    }
    write_json(shard.with_suffix(".json"), summary)
    return summary


def token_dtype(vocab_size: int) -> np.dtype:
    """Of tokens on disk, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def text_hash(content: bytes) -> int:
    """64 bits that decide on which side of the held-out split a text is."""
    return xxhash.xxh3_64_intdigest(content)


def file_hash(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that tells a flipped bit, in one rename."""
    text = json.dumps(content, indent=1)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}\n")
    temporary.rename(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote, or None when it is not there or not intact."""
    try:
        digest, text = path.read_bytes().split(b"\n", 1)
    except (FileNotFoundError, ValueError):
        return None
    text = text.removesuffix(b"\n")
    return json.loads(text) if digest.decode("latin-1") == xxhash.xxh3_128_hexdigest(text) else None


def _batches(reader: Reader) -> Iterator[tuple[list[Document], list[Bad]]]:
    documents: list[Document] = []
    bad: list[Bad] = []
    size = 0
    for one in reader:
        if isinstance(one, Bad):
            bad.append(one)
        else:
            documents.append(one)
        size += len(one.text) if isinstance(one, Document) else 100
        if size >= BATCH_CHARACTERS:
            yield documents, bad
            documents, bad, size = [], [], 0
    yield documents, bad


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    parts = [list(_parts(text)) for text in texts]
    encoded = iter(tokenizer.encode_batch([part for whole in parts for part in whole]))
    for whole in parts:
        yield [i for _ in whole for i in next(encoded)]


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PART_CHARACTERS:
        stop = text.rfind("\n", start, start + PART_CHARACTERS) + 1 or start + PART_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _id_hash(identity: str | None) -> int:
    if identity is None:
        return 0
    return xxhash.xxh3_64_intdigest(identity.encode(errors="surrogatepass")) or 1


def _check_unchanged(file: File) -> None:
    if not file.broken and os.path.exists(file.path):
        info = os.stat(file.path)
        if (info.st_size, info.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
            rule = "changed while it was being read"
            raise DataError(line("data.source", file.path, rule, "start again once it is complete"))
