"""The tokenizer of a recipe: the one it names, or one trained on its corpus; kept in the cache.

    <cache>/tokenizers/<key>/   tokenizer.json or tokenizer.model, info.json with its hash

A given tokenizer is copied there as well: the processes that tokenize read the copy, so a file that
somebody changes meanwhile cannot give one corpus two vocabularies. A trained one sees at most
TRAIN_TEXT_BYTES of text, and training documents only: what is held out is told by a document's text
(`is_held_out`), before there is any corpus.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptm.common.errors import DataError, line
from ptm.data.config import DataConfig
from ptm.data.lock import build_once
from ptm.data.prepare import cache_key
from ptm.data.reader import Bad, Reader
from ptm.data.shard import read_json, text_hash, write_json
from ptm.data.source import File, cut
from ptm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

FORMAT = 1
TRAIN_TEXT_BYTES = 16 << 20
TRAIN_PIECE_BYTES = 1 << 20


def is_held_out(hashes: Any, eval_fraction: float) -> Any:
    """Which documents are for evaluation, by the hash of their text; for an int or an array."""
    return hashes < int(eval_fraction * 2**64)


def prepare_tokenizer(
    config: DataConfig,
    files: list[list[File]],
    *,
    vocab_size: int,
    cache: Path,
    is_builder: bool,
    is_shown: bool,
) -> tuple[Tokenizer, Path]:
    """The tokenizer of a recipe and the cache folder that holds it, trained if need be.

    `files` are those of each source. Raises: DataError, StorageError.
    """
    given = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    if given is None:
        what = (vocab_size, files, config.weights, config.text_key, config.eval_fraction)
        key = cache_key(FORMAT, TRAIN_TEXT_BYTES, *what)
    else:
        key = cache_key(FORMAT, given.fingerprint)
    folder = cache / "tokenizers" / key

    def finished() -> Tokenizer | None:
        info = read_json(folder / "info.json")
        if info is None:
            return None
        try:
            found = load_tokenizer(folder)
        except DataError:
            return None
        return found if found.fingerprint == info["fingerprint"] else None

    def build() -> Tokenizer:
        if given is None and is_shown:
            told = f"data: training a byte-level BPE of {vocab_size} entries on the corpus"
            print(told, file=sys.stderr, flush=True)
        tokenizer = given or train_tokenizer(_training_texts(config, files), vocab_size)
        tokenizer.save(folder)
        write_json(folder / "info.json", {"fingerprint": tokenizer.fingerprint})
        return tokenizer

    lock = cache / "locks" / key
    lock.parent.mkdir(parents=True, exist_ok=True)
    return build_once(lock, finished, build, is_builder=is_builder), folder


def _training_texts(config: DataConfig, files: list[list[File]]) -> Iterator[str]:
    weights = config.weights or [sum(f.size_bytes for f in one) or 1 for one in files]
    first_bad = ""
    is_empty = True
    for one, weight in zip(files, weights):
        left = TRAIN_TEXT_BYTES * weight / sum(weights)
        # In the order of a hash, so that a part of a large corpus stands for all of it.
        pieces = cut(one, TRAIN_PIECE_BYTES)
        for piece in sorted(pieces, key=lambda p: cache_key(p.file.name, p.start)):
            taken = 0
            for document in Reader(piece, config.text_key):
                if isinstance(document, Bad):
                    first_bad = first_bad or f": {piece.file.path}: {document.reason}"
                elif not is_held_out(text_hash(document.text.encode()), config.eval_fraction):
                    yield document.text[:TRAIN_PIECE_BYTES]
                    is_empty = False
                    taken += len(document.text)
                    if taken >= TRAIN_PIECE_BYTES:
                        break
            left -= taken
            if left <= 0:
                break
    if is_empty:
        rule = f"holds no usable document to train a tokenizer on{first_bad}"
        remedy = "`ptm data check` lists what is wrong; add text"
        raise DataError(line("data.source", ",".join(config.source), rule, remedy))
