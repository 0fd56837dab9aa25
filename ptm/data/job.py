"""The verb `data`: prepare a corpus, check its files row by row, or show a packed row.

prepare   tokenize into the cache now, so that training starts at once
check     list every unusable row as file:line: reason, and ids that occur twice
show      print a row as the model gets it: documents apart, labels without loss dimmed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ptm.data.config import DataAction, DataConfig
from ptm.data.corpus import Corpus, open_corpus
from ptm.data.loader import Rows
from ptm.data.prepare import refuse_bad
from ptm.data.progress import BytesDone
from ptm.data.reader import Bad, Reader
from ptm.data.shard import Totals
from ptm.data.source import cut, find
from ptm.data.tokenizer import Tokenizer

PIECE_BYTES = 1 << 62  # whole files: one process reads in order


def run(
    action: DataAction,
    data: DataConfig,
    *,
    vocab_size: int,
    seq_len: int,
    seed: int,
    isolate_documents: bool = True,
    row: int = 0,
) -> None:
    """Do one action and print what came of it to stdout; `row` is the one to show.

    Raises: what `open_corpus` raises; DataError when `check` finds more than the recipe accepts.
    """
    console = Console(highlight=False, soft_wrap=True)
    if action == DataAction.check:
        check(data, console)
        return
    corpus = open_corpus(data, vocab_size=vocab_size, seed=seed, show_progress=True)
    if action == DataAction.prepare:
        _print_report(corpus, console)
    else:
        rows = Rows(corpus.train, seq_len=seq_len, isolate_documents=isolate_documents)
        show(rows, corpus, row, console)


def check(data: DataConfig, console: Console) -> dict[str, dict[str, int]]:
    """List what is wrong in every source; returns the counts by source.

    Raises: DataError when a source has more bad rows than the recipe accepts.
    """
    found: dict[str, dict[str, int]] = {}
    refusals: list[tuple[str, Totals, list[Any]]] = []
    for source in data.source:
        files = find(source)
        totals, duplicates, bad = Totals(), 0, []
        first_seen: dict[str, str] = {}
        total_bytes = sum(f.size_bytes for f in files)
        with BytesDone(f"checking {source}", total_bytes, is_shown=True) as progress:
            for piece in cut(files, PIECE_BYTES):
                reader, path = Reader(piece, data.text_key), piece.file.path
                for one in reader:
                    if isinstance(one, Bad):
                        console.print(f"{path}:{one.line}: {one.reason}", markup=False)
                        totals = totals.plus(Totals(bad_rows=one.num_rows))
                        bad = bad or [(path, one.line, one.reason)]
                        continue
                    totals = totals.plus(Totals(documents=1))
                    if one.id is not None:
                        at = f"{path}:{one.line}"
                        before = first_seen.setdefault(one.id, at)
                        if before != at:
                            duplicates += 1
                            why = f"{at}: id {one.id!r} was seen before, at {before}"
                            console.print(why, markup=False)
                progress.advance(piece.size_bytes)
        console.print(
            f"{source}: {len(files)} files, {totals.documents} documents, {totals.bad_rows} bad "
            f"rows, {duplicates} duplicate ids",
            markup=False,
        )
        found[source] = {**totals._asdict(), "duplicate_ids": duplicates}
        refusals.append((source, totals, bad))
    for refusal in refusals:
        refuse_bad(data, *refusal)
    return found


def show(rows: Rows, corpus: Corpus, row: int, console: Console) -> None:
    """Print row `row` with a line between documents; a token is dim where no loss asks for it."""
    source, epoch, number = rows.locate(row)
    stream = rows.split.streams[source]
    batch = rows.batch(row, row + 1)
    tokens = rows.tokens(row)
    learned = [False, *batch.loss_mask[0].tolist()]  # the first token is nobody's label
    documents = batch.document_ids[0].tolist()
    documents.append(documents[-1] + (tokens[-2] == corpus.tokenizer.eod_id))
    console.print(
        f"row {row}: row {number} of epoch {epoch} of {stream.name}; {len(tokens)} tokens, "
        f"{documents[-1] + 1} documents, {sum(learned)} labels with loss, dim ones without",
        markup=False,
    )
    start = 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or documents[i] != documents[start]:
            title = f"document {documents[start]}"
            show_tokens(title, tokens[start:i], learned[start:i], corpus.tokenizer, console)
            start = i


def show_tokens(
    title: str, tokens: Any, learned: Sequence[bool], tokenizer: Tokenizer, console: Console
) -> None:
    """Print one document under its title; a token that is not learned is dim."""
    names = {i: name for name, i in tokenizer.specials.items()}
    console.rule(Text(title), style="cyan")
    start = 0
    for i in range(1, len(tokens) + 1):
        at_end = i == len(tokens)
        if at_end or learned[i] != learned[start] or tokens[i] in names or tokens[i - 1] in names:
            text = names.get(int(tokens[start])) or tokenizer.decode(tokens[start:i])
            console.print(Text(text, "" if learned[start] else "dim"), end="\n" if at_end else "")
            start = i


def _print_report(corpus: Corpus, console: Console) -> None:
    report = corpus.report()
    for one in report["sources"]:
        console.print(
            f"{one['source']}: {one['documents']:,} documents, {one['tokens']:,} tokens, "
            f"{one['text_bytes'] / 1e6:,.1f} MB of text, {one['bad_rows']:,} bad rows, "
            f"{one['duplicate_ids']:,} duplicate ids; in {one['folder']}",
            markup=False,
        )
        for file, number, reason in one["first_bad"]:
            console.print(f"first bad row: {file}:{number}: {reason}", markup=False)
    console.print(
        f"vocabulary {report['vocab_size']:,}; training {report['train_documents']:,} documents, "
        f"{report['train_tokens']:,} tokens; held out {report['held_out_documents']:,} documents, "
        f"{report['held_out_tokens']:,} tokens"
    )
