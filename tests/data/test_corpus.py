"""What is held out, what is kept in the cache, and what is made again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptm.common.errors import DataError, StorageError
from ptm.data import prepare, reader, shard, vocabulary
from ptm.data.config import DataConfig
from ptm.data.corpus import Corpus, Split, open_corpus
from ptm.data.source import find
from ptm.data.tokenizer import Tokenizer
from tests.support.texts import documents, write_jsonl


def texts_of(corpus: Corpus, split: Split) -> set[str]:
    return {
        corpus.tokenizer.decode(stream.read(i, 0, int(stream.lengths[i])))
        for stream in split.streams
        for i in range(stream.num_documents)
    }


@pytest.fixture
def make(tmp_path: Path, cache: Path, tokenizer_file: str) -> Any:
    """open_corpus on folders of this test, with settings changed."""

    def opened(*names: str, **changes: Any) -> Corpus:
        settings = {
            "source": tuple(str(tmp_path / name) for name in names),
            "tokenizer": tokenizer_file,
            "cache_dir": str(cache),
            "eval_fraction": 0.2,
            **changes,
        }
        return open_corpus(DataConfig(**settings), vocab_size=512, seed=0)

    return opened


def test_documents_are_all_there_and_on_one_side(make: Any, tmp_path: Path) -> None:
    texts = documents(200)
    write_jsonl(tmp_path / "a" / "a.jsonl", texts)
    corpus = make("a")
    train, held_out = texts_of(corpus, corpus.train), texts_of(corpus, corpus.held_out)
    assert train | held_out == set(texts) and not train & held_out
    assert 20 <= len(held_out) <= 60  # 0.2 of 200, within five standard deviations
    stream = corpus.train.streams[0]
    ends = [stream.read(i, 0, int(n))[-1] for i, n in enumerate(stream.lengths)]
    assert set(ends) == {corpus.tokenizer.eod_id}
    report = corpus.report()
    assert report["train_documents"] + report["held_out_documents"] == 200
    assert report["sources"][0]["text_bytes"] == sum(len(t.encode()) for t in texts)
    assert json.loads(json.dumps(report)) == report


def test_side_follows_the_text_not_its_place(make: Any, tmp_path: Path) -> None:
    texts = documents(100)
    write_jsonl(tmp_path / "a" / "a.jsonl", texts)
    write_jsonl(tmp_path / "b" / "z.jsonl", texts[50:][::-1] + ["more"] * 3)
    for i, text in enumerate(texts[:50]):
        (tmp_path / "b" / f"{i}.txt").write_text(text)
    one, other = make("a"), make("b")
    assert texts_of(one, one.held_out) - {"more"} == texts_of(other, other.held_out) - {"more"}
    larger = make("a", eval_fraction=0.4)
    assert texts_of(one, one.held_out) < texts_of(larger, larger.held_out)
    assert not larger.prepared[0].was_built  # the share is no reason to tokenize again


def test_text_that_is_only_for_evaluation(tmp_path: Path, tokenizer_file: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one document"])
    config = DataConfig(source=(str(path),), tokenizer=tokenizer_file, cache_dir=str(tmp_path))
    corpus = open_corpus(config, vocab_size=400, seed=0, is_all_held_out=True)
    assert texts_of(corpus, corpus.held_out) == {"one document"}
    assert not corpus.train.streams and corpus.report()["train_tokens"] == 0


def test_several_sources_with_weights(make: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "a.jsonl", documents(60, seed=1))
    write_jsonl(tmp_path / "b" / "a.jsonl", documents(20, seed=2))
    corpus = make("a", "b", weights=(3.0, 1.0))
    assert [s.name for s in corpus.train.streams] == [str(tmp_path / n) for n in "ab"]
    assert corpus.train.weights == (3.0, 1.0)
    found = [texts_of(corpus, corpus.train._replace(streams=(s,))) for s in corpus.train.streams]
    assert found[0] <= set(documents(60, seed=1)) and found[1] <= set(documents(20, seed=2))
    assert len(corpus.held_out.streams) == 1
    assert not make("b").prepared[0].was_built  # kept by source


def test_empty_side_is_refused_with_the_number_that_mends_it(make: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "a.jsonl", documents(9))
    with pytest.raises(DataError, match="none of the 9 documents .* held-out .*set it to 0") as e:
        make("a", eval_fraction=0.0001)
    mended = float(str(e.value).split("set it to ")[1].split(",")[0])
    assert make("a", eval_fraction=mended).held_out.num_documents == 1
    (tmp_path / "b.txt").write_text(next(t for t in documents(99) if side(t, 0.5)))
    with pytest.raises(DataError, match="none of the 1 documents .* training split.*add documents"):
        make("b.txt", eval_fraction=0.5)


def side(text: str, fraction: float) -> bool:
    return vocabulary.is_held_out(shard.text_hash(text.encode()), fraction)


def test_too_large_tokenizer(make: Any, tmp_path: Path, tokenizer_file: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(20))
    config = DataConfig(source=(str(tmp_path / "a.jsonl"),), tokenizer=tokenizer_file)
    rule = "has 400 ids and the model holds 399; set model.vocab_size=512"
    with pytest.raises(DataError, match=rule):
        open_corpus(config, vocab_size=399, seed=0)


def test_trained_tokenizer_never_sees_held_out_text(tmp_path: Path, cache: Path) -> None:
    def repeated(word: str, *, held_out: bool) -> str:
        texts = (f"{word} " * 300 + str(i) for i in range(99))
        return next(text for text in texts if side(text, 0.2) == held_out)

    more = [repeated("qjqkqjqk", held_out=False), repeated("zyxwzyxw", held_out=True)]
    path = write_jsonl(tmp_path / "a.jsonl", documents(300) + more)
    config = DataConfig(source=(str(path),), cache_dir=str(cache), eval_fraction=0.2)
    corpus = open_corpus(config, vocab_size=400, seed=0)
    assert len(corpus.tokenizer.encode(" qjqkqjqk")) == 1  # learned from training text
    assert len(corpus.tokenizer.encode(" zyxwzyxw")) > 4
    assert more[1] in texts_of(corpus, corpus.held_out)


def test_cache_is_used_until_something_changes(make: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(50))
    assert make("a.jsonl").prepared[0].was_built
    assert not make("a.jsonl").prepared[0].was_built
    assert make("a.jsonl", tokenizer=None).prepared[0].was_built  # another vocabulary
    before = path.stat()
    path.write_text(path.read_text().replace("cat", "cow"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    again = make("a.jsonl")
    assert again.prepared[0].was_built
    assert any("cow" in text for text in texts_of(again, again.train))


def shards_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize(
    "name",
    ["shard-00001.tokens", "shard-00002.documents", "index.json", "tokenizer.json", "info.json"],
)
def test_damage_is_found_and_only_that_is_made_again(
    make: Any,
    tmp_path: Path,
    cache: Path,
    name: str,
    damage: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepare, "MIN_SHARD_BYTES", 2000)
    write_jsonl(tmp_path / "a.jsonl", documents(60))
    first = make("a.jsonl")
    folder = first.prepared[0].folder
    before, times = shards_of(folder), {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert len(before) > 9
    texts = texts_of(first, first.train)
    [path] = [p for p in cache.rglob(name)]
    damage(path)
    again = make("a.jsonl")
    assert texts_of(again, again.train) == texts
    assert shards_of(folder) == before
    after = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    changed = {n for n in before if times[n] != after[n]}
    if "shard" in name:
        stem = name.split(".")[0]
        assert changed == {"index.json", *(f"{stem}.{x}" for x in ("tokens", "documents", "json"))}
    else:
        assert changed <= {"index.json"}
    told = capfd.readouterr().err
    assert (f"{name} is damaged: making it again" in told) == (path.parent == folder)


def test_source_that_changes_while_it_is_read(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(50))
    found = vocabulary.prepare_tokenizer

    def then_append(*args: Any, **options: Any) -> Any:
        write_jsonl(path, documents(51))
        return found(*args, **options)

    monkeypatch.setattr("ptm.data.corpus.prepare_tokenizer", then_append)
    with pytest.raises(DataError, match="a.jsonl: changed while it was being read"):
        make("a.jsonl")


def test_long_documents_are_encoded_in_parts(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "PART_CHARACTERS", 1000)
    text = "".join(f"line {i}\n" for i in range(500)) + "x" * 3000
    path = write_jsonl(tmp_path / "a.jsonl", ["before", text, "after"])
    pieces = list(prepare.cut(find(str(path)), 1 << 40))
    shard.write_shard(tmp_path / "shard", pieces, "text", tokenizer, lambda _: None)
    tokens = np.fromfile(tmp_path / "shard.tokens", np.uint16)
    ends = np.flatnonzero(tokens == tokenizer.eod_id)
    assert len(ends) == 3 and tokenizer.decode(tokens[ends[0] + 1 : ends[1]]) == text


def test_tokens_beyond_16_bits() -> None:
    assert shard.token_dtype(1 << 16) == np.uint16 and shard.token_dtype((1 << 16) + 1) == np.uint32


def test_cache_that_cannot_be_written(make: Any, tmp_path: Path, cache: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(50))
    cache.write_text("a file where a folder should be")
    with pytest.raises(
        StorageError, match=r"data.cache_dir=.*\(Not a directory\); free space"
    ) as e:
        make("a.jsonl")
    assert e.value.exit_code == 74


def test_failing_disk_is_not_a_bad_row(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> bytes:
        raise OSError(5, "Input/output error")

    path = write_jsonl(tmp_path / "a.jsonl", documents(50))
    make("a.jsonl")  # the tokenizer is there
    monkeypatch.setattr(reader, "_skip_line", failing)
    monkeypatch.setattr(reader, "MAX_TEXT_BYTES", 10)
    [piece] = prepare.cut(find(str(path)), 1 << 40)
    with pytest.raises(StorageError, match="Input/output error"):
        list(reader.Reader(piece, "text"))


def test_leftovers_of_a_killed_builder(make: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(50))
    folder = make("a.jsonl").prepared[0].folder
    partial = folder.with_suffix(".partial")
    shutil.copytree(folder, partial)
    shutil.rmtree(folder)
    (partial / "index.json").unlink()
    (partial / "shard-00000.tmp-123").write_text("half")
    truncate(partial / "shard-00000.json")
    again = make("a.jsonl")
    assert again.prepared[0].was_built and not list(folder.glob("*.tmp-*"))
