"""Rows hold every document once an epoch; any layout gets the same rows a step (T07, T08)."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ptm.common.errors import DataError
from ptm.data.config import DataConfig
from ptm.data.corpus import Corpus, open_corpus
from ptm.data.loader import Loader, Rows
from ptm.data.pack import Batch
from tests.support.texts import documents, write_jsonl

SEQ_LEN = 16
TEXTS = {name: documents(40, seed=i) for i, name in enumerate(("first", "second"))}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: str) -> DataConfig:
    folder = tmp_path_factory.mktemp("text")
    sources = [write_jsonl(folder / f"{name}.jsonl", texts) for name, texts in TEXTS.items()]
    return DataConfig(
        source=tuple(map(str, sources)),
        weights=(0.7, 0.3),
        tokenizer=tokenizer_file,
        eval_fraction=0.2,
        cache_dir=str(folder / "cache"),
    )


def opened(config: DataConfig, seed: int = 5) -> Corpus:
    return open_corpus(config, vocab_size=400, seed=seed)


def rows_of(config: DataConfig, seed: int = 5) -> Rows:
    return Rows(opened(config, seed).train, seq_len=SEQ_LEN)


def sha(batches: list[Batch]) -> str:
    """Of all that the model is given, in order."""
    joined = [torch.cat(parts) for parts in zip(*batches)]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in joined)).hexdigest()


def test_an_epoch_is_every_document_once_in_hashed_order(config: DataConfig) -> None:
    corpus = opened(config)
    rows, tokenizer = Rows(corpus.train, seq_len=SEQ_LEN), corpus.tokenizer
    located = {}
    for i in range(4 * 1000):
        located.setdefault(rows.locate(i), i)
    orders = []
    for source, name in enumerate(TEXTS):
        for epoch in (0, 1):
            ids = sorted(k for k in located if k[:2] == (source, epoch))
            assert [k.row for k in ids] == list(range(rows.rows_per_epoch[source]))
            pieces = [rows.tokens(located[k])[:-1] for k in ids]
            stream = np.concatenate([*pieces, rows.tokens(located[ids[-1]])[-1:]]).tolist()
            # The stream, cut at <eod>, is the texts themselves; only its end may be missing.
            found = [[*part] for part in cut(stream, tokenizer.eod_id)]
            expected = {tuple(tokenizer.encode(text)) for text in TEXTS[name]}
            whole = Counter(tuple(part) for part in found[:-1])
            assert set(whole) <= expected and max(whole.values()) == 1
            assert len(whole) >= corpus.train.streams[source].num_documents - 2
            assert any(list(e)[: len(found[-1])] == found[-1] for e in expected)
            orders.append(list(whole))
    assert orders[0] != orders[1]  # another order in each epoch


def cut(stream: list[int], eod: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in stream:
        if token == eod:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_rows_overlap_by_the_one_token_that_is_a_label_here_and_an_input_there(
    config: DataConfig,
) -> None:
    rows = rows_of(config)
    ids = {rows.locate(i): i for i in range(500)}
    pairs = [(i, ids[k._replace(row=k.row + 1)]) for k, i in ids.items() if
             k._replace(row=k.row + 1) in ids]  # fmt: skip
    assert len(pairs) > 100
    for i, after in pairs:
        assert rows.tokens(i)[-1] == rows.tokens(after)[0]


def test_t07_a_step_is_the_same_on_any_layout(config: DataConfig) -> None:
    rows_per_step, steps = 13, range(40, 43)
    rows = rows_of(config)
    with Loader(rows, rows_per_step=rows_per_step, micro_batch_size=rows_per_step) as one:
        expected = {s: sha(one.micro_batches(s)) for s in steps}
        digests = {s: one.digest(s) for s in steps}
    assert len(set(expected.values())) == len(set(digests.values())) == len(steps)
    for world, threads, size in itertools.product((1, 2, 3, 4), (0, 1, 2), (1, 2, 4)):
        loaders = [
            Loader(
                rows_of(config),
                rows_per_step=rows_per_step,
                rank=rank,
                world=world,
                micro_batch_size=size,
                prefetch=threads,
            )
            for rank in range(world)
        ]
        for step in steps:
            parts = [loader.micro_batches(step) for loader in loaders]
            assert len({len(part) for part in parts}) == 1  # as many on every rank
            assert all(len(b.input_ids) <= size for part in parts for b in part)
            assert sha([b for part in parts for b in part]) == expected[step]
            assert {loader.digest(step) for loader in loaders} == {digests[step]}
        if world > 1:  # the check itself can fail: ranks in another order are another step
            assert sha([b for part in parts[::-1] for b in part]) != expected[steps[-1]]
        for loader in loaders:
            loader.close()


def test_t08_stop_and_go_on_three_times_after_every_step(config: DataConfig) -> None:
    settings = {"rows_per_step": 6, "micro_batch_size": 4, "world": 2}
    streams = []
    for rank in (0, 1):
        with Loader(rows_of(config), rank=rank, prefetch=1, **settings) as loader:
            whole = [sha(loader.micro_batches(s)) for s in range(44)]
        assert len(set(whole)) == 44
        streams.append(whole)
        for stop in range(41):
            for step in (stop, stop + 1, stop + 2):  # each in a process that knows but the step
                with Loader(rows_of(config), rank=rank, prefetch=2, **settings) as again:
                    assert sha(again.micro_batches(step)) == whole[step]
    assert not set(streams[0]) & set(streams[1])
    epochs = {rows_of(config).locate(i)[:2] for i in range(44 * 6)}
    assert len(epochs) > 2  # the stretch mixes sources and crosses an epoch


def test_order_follows_the_seed(config: DataConfig) -> None:
    def first(seed: int) -> str:
        return Loader(rows_of(config, seed), rows_per_step=8, micro_batch_size=8).digest(0)

    assert first(5) == first(5) != first(6)
    held_out = [Rows(opened(config, s).held_out, seq_len=SEQ_LEN).tokens(3) for s in (5, 6)]
    np.testing.assert_array_equal(*held_out)


def test_more_ranks_than_rows(config: DataConfig) -> None:
    loaders = [
        Loader(rows_of(config), rows_per_step=2, rank=r, world=3, micro_batch_size=2)
        for r in range(3)
    ]
    parts = [loader.micro_batches(0) for loader in loaders]
    assert [[len(b.input_ids) for b in part] for part in parts] == [[0], [1], [1]]
    assert parts[0][0].input_ids.shape == (0, SEQ_LEN)


def test_jumping_forgets_what_was_made_ahead(config: DataConfig) -> None:
    with Loader(rows_of(config), rows_per_step=4, micro_batch_size=4, prefetch=2) as loader:
        plain = Loader(rows_of(config), rows_per_step=4, micro_batch_size=4)
        for step in (0, 9, 3, 4, 0):
            assert sha(loader.micro_batches(step)) == sha(plain.micro_batches(step))
            assert set(loader.ahead) <= {step + 1, step + 2}


def test_prefetch_carries_errors(config: DataConfig) -> None:
    rows = rows_of(config)
    with Loader(rows, rows_per_step=4, micro_batch_size=4, prefetch=1) as loader:
        rows.batch = None  # type: ignore[assignment, method-assign]
        with pytest.raises(TypeError):
            loader.micro_batches(0)


def test_one_pool_without_weights(config: DataConfig) -> None:
    pool = DataConfig(
        source=config.source,
        tokenizer=config.tokenizer,
        eval_fraction=config.eval_fraction,
        cache_dir=config.cache_dir,
    )
    corpus = opened(pool)
    assert len(corpus.train.streams) == 1
    assert corpus.train.num_tokens == opened(config).train.num_tokens
    assert not any(one.was_built for one in corpus.prepared)  # the same shards serve both
    rows = Rows(corpus.train, seq_len=SEQ_LEN)
    assert {rows.locate(i) for i in range(rows.num_rows)} == {
        (0, 0, row) for row in range(rows.num_rows)
    }


def test_too_little_text_for_one_row(config: DataConfig, tmp_path: Path) -> None:
    corpus = opened(config)
    tokens = corpus.held_out.num_tokens
    assert Rows(corpus.held_out, seq_len=tokens - 1).num_rows == 1
    rule = (
        f"train.seq_len={tokens}: a row takes {tokens + 1} tokens, .* has {tokens} in .*raise data"
    )
    with pytest.raises(DataError, match=rule):
        Rows(corpus.held_out, seq_len=tokens)
    with pytest.raises(
        DataError, match="training split of .*first.jsonl has .*or set train.seq_len"
    ):
        Rows(corpus.train, seq_len=10**6)
