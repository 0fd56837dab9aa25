"""The `data` section of a recipe: which text and tokenizer, what is held out, what of bad rows.

Used by ptm/data/prepare.py (once per corpus), ptm/data/loader.py (every step) and the verb `data`.
The order of the data is not set here: it is a pure function of `train.seed` and the step.
"""

from __future__ import annotations

from ptm.common.config import Choice, config, ranged
from ptm.common.errors import RecipeError, line

PYTHON_STDLIB = "python_stdlib"


class BadRows(Choice):
    """What to do with a row that is not usable text."""

    skip = "skip"
    fail = "fail"


class DataAction(Choice):
    """What the verb `data` does."""

    prepare = "prepare"
    check = "check"
    show = "show"


@config
class DataConfig:
    source: tuple[str, ...] = (PYTHON_STDLIB,)
    """Where the text is: a folder, a glob or a file of .txt (one document a file), .jsonl,
    .jsonl.gz, .jsonl.zst or .parquet; several are separated by commas. `python_stdlib` is the
    source code of this interpreter's standard library, real text that is present on every
    machine."""
    weights: tuple[float, ...] = ranged((), above=0.0)
    """Share of training rows each source gives, one number per source in the same order; they
    need not sum to 1. Empty: all sources are one pool, each document once an epoch."""
    tokenizer: str | None = None
    """A tokenizer.json, a sentencepiece *.model, or a folder that holds one. None: a byte-level
    BPE with `model.vocab_size` entries is trained on the training documents and cached."""
    text_key: str = "text"
    """Key (.jsonl) or column (.parquet) that holds the text."""
    eval_fraction: float = ranged(0.02, above=0.0, most=0.5)
    """Share of documents held out for evaluation, chosen by a hash of their text: the same text
    is always on the same side, whatever the order or names of the files."""
    cache_dir: str | None = None
    """Folder for tokenized data. None: PTM_CACHE, else ~/.cache/ptm."""
    bad_rows: BadRows = BadRows.skip
    """`skip` leaves out rows that are not usable text and counts them, up to
    `max_bad_fraction`; `fail` stops at the first one."""
    max_bad_fraction: float = ranged(0.01, least=0.0, most=1.0)
    """Largest share of bad rows in a source that `bad_rows=skip` accepts."""
    replay: float = ranged(0.0, least=0.0, most=100.0)
    """In modes other than pretrain: weight of the loss of pretraining text, `source`, beside the
    mode's own, and how many rows of it a step has for each of its own rows. 0 is none."""
    workers: int = ranged(0, least=0, most=256)
    """Processes that tokenize; 0 is one per CPU core this process may use."""
    prefetch: int = ranged(1, least=0, most=16)
    """Steps whose batches are made ahead in a thread; 0 makes each when it is asked for."""

    def check(self) -> None:
        if isinstance(self.source, str):  # one source needs no brackets
            object.__setattr__(self, "source", (self.source,))
        if not self.source or not all(self.source):
            raise RecipeError(
                line("data.source", self.source, "must name at least one place", "give a folder")
            )
        if self.weights and len(self.weights) != len(self.source):
            rule = f"must be one number per source: {len(self.weights)} for {len(self.source)}"
            raise RecipeError(line("data.weights", self.weights, rule, "add or remove numbers"))
