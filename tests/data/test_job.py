"""What the verb `data` prints."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ptm.common.errors import DataError
from ptm.data import job
from ptm.data.config import DataAction, DataConfig
from ptm.data.corpus import open_corpus
from ptm.data.loader import Rows
from tests.support.texts import documents, write_jsonl


@pytest.fixture
def config(tmp_path: Path, cache: Path, tokenizer_file: str) -> DataConfig:
    path = write_jsonl(tmp_path / "a.jsonl", documents(60))
    return DataConfig(
        source=(str(path),), tokenizer=tokenizer_file, cache_dir=str(cache), eval_fraction=0.2
    )


def run(action: DataAction, config: DataConfig) -> None:
    job.run(action, config, vocab_size=400, seq_len=64, seed=1)


def test_prepare_says_what_there_is(
    config: DataConfig, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    run(DataAction.prepare, config)
    out = capsys.readouterr().out
    assert f"{config.source[0]}: 60 documents, " in out and "0 bad rows, 0 duplicate ids" in out
    report = open_corpus(config, vocab_size=400, seed=1).report()
    assert f"training {report['train_documents']} documents" in out
    assert f"held out {report['held_out_documents']} documents" in out and str(cache) in out


def test_check_ends_as_the_recipe_says(
    config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run(DataAction.check, config)
    assert capsys.readouterr().out.endswith("60 documents, 0 bad rows, 0 duplicate ids\n")
    path = Path(config.source[0])
    path.write_text(path.read_text() + "[]\n{}\n")
    with pytest.raises(
        DataError, match=f"2 of 62 rows of {path} are not usable, first {path}:61: "
    ):
        run(DataAction.check, config)
    assert f"{path}:61: not a JSON object but a list\n{path}:62: no key 'text'\n" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("isolate", [True, False])
def test_show_is_the_row_with_unlearned_tokens_dim(config: DataConfig, isolate: bool) -> None:
    corpus = open_corpus(config, vocab_size=400, seed=1)
    rows = Rows(corpus.train, seq_len=64, isolate_documents=isolate)
    batch = rows.batch(3, 4)
    assert (batch.loss_mask[0].sum() < 64) == isolate
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, highlight=False, soft_wrap=True)
    job.show(rows, corpus, 3, console)
    head, *lines = out.getvalue().split("\n")
    num_documents = int(batch.document_ids.max()) + 1
    text = "\n".join(line for line in lines if "\u2500" not in line)
    assert f"{num_documents} documents, {int(batch.loss_mask.sum())} labels with loss" in head
    assert sum("document " in line and "\u2500" in line for line in lines) == num_documents
    assert text.count("\x1b[2m") == 1 + int((~batch.loss_mask).sum())  # and the first token
    assert text.count("<eod>") == int((rows.tokens(3) == corpus.tokenizer.eod_id).sum())
