"""Tokenizers lose nothing, find their special tokens, count bytes, and refuse broken files."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.common.errors import DataError
from ptm.data.tokenizer import MAX_FILE_BYTES, Tokenizer, load_tokenizer, train_tokenizer
from tests.support.texts import TEXT, documents

TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="session")
def m32(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small sentencepiece file made as M32's is: BPE, byte fallback, specials as pieces."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(row for text in documents(100) for row in text.splitlines()),
        model_writer=out,
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        user_defined_symbols=["<eod>", "<n>", "<sep>", "<pad>"],
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("m32") / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return load_tokenizer(path)


@given(TEXTS)
@settings(deadline=None)
def test_trained_gives_back_any_text_and_its_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]


def test_trained_reads_special_names_as_text_unless_told(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eod_id, tokenizer.sep_id, tokenizer.pad_id) == (0, 1, 2)
    text = "a<eod> b<sep>"
    assert not {0, 1, 2} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    special = tokenizer.encode(text, special=True)
    assert special == [*tokenizer.encode("a"), 0, *tokenizer.encode(" b"), 1]
    assert tokenizer.decode(special) == "a b"
    assert tokenizer.token_bytes()[[0, 1, 2]].tolist() == [0, 0, 0]
    assert tokenizer.decode([0, 10**6]) == ""


def test_training_is_the_same_in_every_process(tokenizer: Tokenizer) -> None:
    code = (
        "from ptm.data.tokenizer import train_tokenizer; from tests.support.texts import documents;"
        "print(train_tokenizer(iter(documents(200)), 400).fingerprint)"
    )
    root = Path(__file__).parents[2]
    said = [subprocess.check_output([sys.executable, "-c", code], cwd=root) for _ in range(2)]
    assert {s.decode().strip() for s in said} == {tokenizer.fingerprint}


def test_training_learns_merges_up_to_the_size() -> None:
    assert train_tokenizer(iter(documents(200)), 300).vocab_size == 300
    assert train_tokenizer(iter(["ab ab"]), 5000).vocab_size < 270
    with pytest.raises(DataError, match="model.vocab_size=258: .* at least 259"):
        train_tokenizer(iter(["a"]), 258)


def test_save_and_load(tokenizer: Tokenizer, m32: Tokenizer, tmp_path: Path) -> None:
    for i, one in enumerate((tokenizer, m32)):
        one.save(tmp_path / str(i))
        again = load_tokenizer(tmp_path / str(i))
        assert again.fingerprint == one.fingerprint and again.vocab_size == one.vocab_size
        assert again.encode(TEXT) == one.encode(TEXT)


def test_sentencepiece(m32: Tokenizer) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=m32.content)  # type: ignore
    assert (m32.eod_id, m32.sep_id, m32.pad_id) == (3, 5, 6)
    text = "the cat<n>sat\non 中文 12"
    assert m32.encode(text) == reference.encode(text.replace("<n>", "\n"))
    assert reference.bos_id() not in m32.encode(text)  # never a BOS
    assert reference.piece_to_id("<n>") not in m32.encode(text)
    assert m32.encode(text).count(reference.piece_to_id("<0x0A>")) == 2
    assert m32.encode_batch([text, "a"]) == [m32.encode(text), m32.encode("a")]
    assert m32.decode(m32.encode(text)) == text.replace("<n>", "\n")
    assert m32.encode("a<sep>b<eod>", special=True) == [*m32.encode("a"), 5, *m32.encode("b"), 3]
    shown = text.replace("<n>", "\n")
    assert m32.token_bytes()[m32.encode(text)].sum() == len(shown.encode()) + 1
    assert m32.decode([3, 5, 6, 10**6]) == ""


def test_metaspace_tokenizer_counts_bytes(tmp_path: Path) -> None:
    """Llama's kind of tokenizer.json: spaces as a low block, bytes as <0x0A>."""
    pieces = ["<unk>", "</s>", "\u2581", "a", "\u2581a", "é", "<0x0A>"]
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [
                    {"id": 1, "content": "</s>", "special": True, "single_word": False}
                    | {"lstrip": False, "rstrip": False, "normalized": False}
                ],
                "pre_tokenizer": {
                    "type": "Metaspace",
                    "replacement": "\u2581",
                    "prepend_scheme": "never",
                },
                "decoder": {"type": "Metaspace", "replacement": "\u2581"},
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}]
                    + [{"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
                },
                "truncation": {
                    "direction": "Right",
                    "max_length": 2,
                    "strategy": "LongestFirst",
                    "stride": 0,
                },
                "model": {
                    "type": "Unigram",
                    "unk_id": 0,
                    "vocab": [[p, -float(i)] for i, p in enumerate(pieces)],
                },
            }
        )
    )
    found = load_tokenizer(tmp_path)
    assert found.eod_id == 1 and found.vocab_size == len(pieces)
    assert found.encode("a a aé") == [3, 4, 4, 5]  # not cut at 2, and no </s> put in front
    assert found.token_bytes().tolist() == [5, 0, 1, 1, 2, 2, 1]


def hostile(tokenizer: Tokenizer) -> dict[str, bytes]:
    good = json.loads(tokenizer.content)
    no_eod = json.dumps(good).replace("<eod>", "<what>").encode()
    vocab = {**good["model"]["vocab"], "zz": 4_000_000_000}
    return {
        "empty": b"",
        "text": b"hello",
        "list": b"[]",
        "nested": b"[" * 100_000,
        "cut": tokenizer.content[:5000],
        "binary": random.Random(0).randbytes(5000),
        "no eod": no_eod,
        "huge id": json.dumps({**good, "model": {**good["model"], "vocab": vocab}}).encode(),
        "unknown model": json.dumps({**good, "model": {"type": "Python", "code": "1"}}).encode(),
        "bad pattern": json.dumps(
            {**good, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}
        ).encode(),
        "negative id": tokenizer.content.replace(b'"<eod>": 0', b'"<eod>": -1'),
    }


@pytest.mark.parametrize("kind", range(11))
def test_hostile_json(tokenizer: Tokenizer, kind: int, tmp_path: Path) -> None:
    name, content = list(hostile(tokenizer).items())[kind]
    refused(tmp_path / "tokenizer.json", content, name)


def test_hostile_model(m32: Tokenizer, tmp_path: Path) -> None:
    refused(tmp_path / "a.model", b"", "empty")
    refused(tmp_path / "a.model", random.Random(0).randbytes(3000), "noise")
    no_eod = m32.content.replace(b"<eod>", b"<odd>").replace(b"</s>", b"</t>")
    refused(tmp_path / "a.model", no_eod, "no eod")


def refused(path: Path, content: bytes, why: str) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^data.tokenizer=.*: .*; ") as e:
        load_tokenizer(path)
    assert "\n" not in str(e.value) and e.value.exit_code == 4, why


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_are_refused_or_work(
    tokenizer: Tokenizer, m32: Tokenizer, seed: int, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    one, name = ((tokenizer, "tokenizer.json"), (m32, "a.model"))[seed % 2]
    content = bytearray(one.content)  # type: ignore[attr-defined]
    for _ in range(draw.choice([1, 1, 5, 50])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (tmp_path / name).write_bytes(content[: draw.choice([None, draw.randrange(len(content))])])
    try:
        found = load_tokenizer(tmp_path / name)
    except DataError as e:
        assert "\n" not in str(e)
        return
    ids = [i for part in found.encode_batch([TEXT, "a<n>b"]) for i in part]
    found.decode(ids)
    assert found.token_bytes()[ids].min() >= 0


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with open(tmp_path / "big.model", "wb") as f:
        f.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(DataError, match="larger than 256 MiB"):
        load_tokenizer(tmp_path / "big.model")
