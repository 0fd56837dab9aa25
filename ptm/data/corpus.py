"""A prepared corpus as training sees it: streams of tokens, split into training and held out.

`open_corpus` is the way in: it prepares on first use (ptm/data/prepare.py) and maps the shards into
memory. A `Stream` is one side of one source, or of all sources when they are one pool: documents by
number, each a slice of a shard, ended by <eod>. Nothing is copied and nothing is ordered here; rows
are cut and ordered by ptm/data/loader.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ptm.common.env import cache_dir
from ptm.common.errors import DataError, StorageError, line
from ptm.data.config import DataConfig
from ptm.data.prepare import Prepared, prepare_source
from ptm.data.shard import DOCUMENT_COLUMNS, token_dtype
from ptm.data.source import find
from ptm.data.tokenizer import Tokenizer
from ptm.data.vocabulary import is_held_out, prepare_tokenizer

HELD_OUT_SEED = 0


class Shard(NamedTuple):
    """Tokens (memory-mapped) of some documents, and the documents' (hash, length, id hash)."""

    tokens: np.ndarray
    documents: np.ndarray


class Stream:
    """Documents by number: `lengths[i]` tokens each, the last one <eod>."""

    def __init__(self, name: str, shards: Sequence[Shard], is_kept: Sequence[np.ndarray]) -> None:
        self.name = name
        self.tokens = [shard.tokens for shard in shards]
        lengths = [shard.documents[:, 1].astype(np.int64) for shard in shards]
        starts = [np.cumsum(one) - one for one in lengths]
        self.lengths = np.concatenate([a[k] for a, k in zip(lengths, is_kept)])
        self.starts = np.concatenate([a[k] for a, k in zip(starts, is_kept)])
        self.first_of_shard = np.cumsum([0, *(int(k.sum()) for k in is_kept)])
        self.num_documents = len(self.lengths)
        self.num_tokens = int(self.lengths.sum())

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document."""
        shard = int(np.searchsorted(self.first_of_shard, document, side="right")) - 1
        at = int(self.starts[document])
        return self.tokens[shard][at + start : at + stop]


class Split(NamedTuple):
    """One side of the corpus: its streams, their weights, and the seed of their order."""

    name: str
    streams: tuple[Stream, ...]
    weights: tuple[float, ...]
    seed: int
    eod_id: int

    @property
    def num_documents(self) -> int:
        return sum(stream.num_documents for stream in self.streams)

    @property
    def num_tokens(self) -> int:
        return sum(stream.num_tokens for stream in self.streams)


class Corpus(NamedTuple):
    """What `open_corpus` gives: a tokenizer and the two sides of the split."""

    tokenizer: Tokenizer
    train: Split
    held_out: Split
    prepared: tuple[Prepared, ...]

    def report(self) -> dict[str, Any]:
        """What is in the corpus, as JSON: sizes, the ledger of bad rows, where it is kept."""
        return {
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint,
            "train_documents": self.train.num_documents,
            "train_tokens": self.train.num_tokens,
            "held_out_documents": self.held_out.num_documents,
            "held_out_tokens": self.held_out.num_tokens,
            "sources": [
                {
                    "source": one.source,
                    **one.ledger["totals"],
                    "duplicate_ids": one.ledger["duplicate_ids"],
                    "first_bad": one.ledger["bad"][:1],
                    "folder": str(one.folder),
                    "was_built": one.was_built,
                }
                for one in self.prepared
            ],
        }


def open_corpus(
    config: DataConfig,
    *,
    vocab_size: int,
    seed: int,
    is_builder: bool = True,
    show_progress: bool = False,
    is_all_held_out: bool = False,
) -> Corpus:
    """Open the corpus of a recipe, preparing what is not in the cache yet.

    Every rank calls it; one process of all that share the cache builds, the others wait for it and
    take over if it dies. With `is_builder=False` a rank first waits a few seconds for a builder to
    begin: pass `rank == 0` there and for `show_progress`, and the bar stays on rank 0.

    `is_all_held_out` is for text that was never trained on: all of it is held out, none is for
    training.

    `vocab_size` is the model's: the size a tokenizer is trained to, and the most a given one may
    have. `seed` orders training rows; held-out rows have one order for all seeds, so that losses of
    different runs compare. The corpus on disk depends on neither.

    Raises: DataError (no text, too many bad rows, a broken or too large tokenizer, an empty side of
    the split), StorageError (the disk is full or not writable).
    """
    cache = Path(config.cache_dir or cache_dir()).absolute()
    try:
        files = [find(source) for source in config.source]
    except OSError as e:
        where = e.filename or config.source
        raise DataError(line("data.source", where, f"{e.strerror}", "name another place")) from e
    try:
        tokenizer, folder = prepare_tokenizer(
            config,
            files,
            vocab_size=vocab_size,
            cache=cache,
            is_builder=is_builder,
            is_shown=show_progress,
        )
        if tokenizer.vocab_size > vocab_size:
            rule = f"has {tokenizer.vocab_size} ids and the model holds {vocab_size}"
            remedy = f"set model.vocab_size={-(-tokenizer.vocab_size // 128) * 128}"
            raise DataError(line("data.tokenizer", config.tokenizer, rule, remedy))
        prepared = tuple(
            prepare_source(
                source,
                found,
                config,
                tokenizer,
                folder,
                cache=cache,
                is_builder=is_builder,
                is_shown=show_progress,
            )
            for source, found in zip(config.source, files)
        )
        shards = [_map_shards(one) for one in prepared]
    except StorageError:
        raise
    except OSError as e:
        rule = f"cannot be written ({e.strerror or e})"
        remedy = "free space, or set data.cache_dir to a folder that can be written"
        raise StorageError(line("data.cache_dir", cache, rule, remedy)) from e
    pool = [shard for one in shards for shard in one]
    if is_all_held_out:
        train, weights = [], ()
        held_out = Stream(config.source[0], pool, [np.ones(len(s.documents), bool) for s in pool])
    else:
        weights = config.weights or (1.0,)
        groups = list(zip(config.source, shards)) if config.weights else [(config.source[0], pool)]
        train = [_stream(config, name, group, held_out=False) for name, group in groups]
        # One pool whatever the weights: a source may have too little held out to fill a row.
        held_out = _stream(config, config.source[0], pool, held_out=True)
    return Corpus(
        tokenizer,
        Split("training", tuple(train), weights, seed, tokenizer.eod_id),
        Split("held-out", (held_out,), (1.0,), HELD_OUT_SEED, tokenizer.eod_id),
        prepared,
    )


def _map_shards(prepared: Prepared) -> list[Shard]:
    dtype = token_dtype(prepared.ledger["vocab_size"])
    shards = []
    for i, info in enumerate(prepared.ledger["shards"]):
        if not info["documents"]:  # an empty file cannot be mapped
            continue
        path = prepared.folder / f"shard-{i:05d}"
        tokens = np.memmap(path.with_suffix(".tokens"), dtype, "r")
        table = np.fromfile(path.with_suffix(".documents"), "<u8")
        shards.append(Shard(tokens, table.reshape(-1, DOCUMENT_COLUMNS)))
    return shards


def _stream(config: DataConfig, name: str, shards: list[Shard], *, held_out: bool) -> Stream:
    fraction = config.eval_fraction
    kept = [is_held_out(shard.documents[:, 0], fraction) == held_out for shard in shards]
    stream = Stream(name, shards, kept)
    if not stream.num_documents:
        hashes = np.concatenate([shard.documents[:, 0] for shard in shards]) / 2**64
        side, best = ("held-out", hashes.min()) if held_out else ("training", hashes.max())
        rule = f"leaves none of the {len(hashes)} documents of {name} in the {side} split"
        best = np.ceil(best * 1e4) / 1e4 if held_out else np.floor(best * 1e4) / 1e4
        better = f"set it to {best:g}, or " if 0 < best <= 0.5 else ""
        remedy = f"{better}add documents (a .txt file is one document)"
        raise DataError(line("data.eval_fraction", fraction, rule, remedy))
    return stream
