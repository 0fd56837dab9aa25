"""The verb `ptm data`: of the text of a recipe (ptm/data/job.py) or, with another mode than
pretrain, of the rows that the mode learns from, as ptm/modes.py opens them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ptm.data import job as data_job
from ptm.data.config import BadRows, DataAction, DataConfig
from ptm.data.conversations import OnBad, ignore
from ptm.data.corpus import open_corpus
from ptm.data.preferences import Maker, Order, Prompt, Sides, open_pairs, open_prompts
from ptm.data.prepare import refuse_bad
from ptm.data.sft import Conversations, PackedRows, chat_template, open_conversations
from ptm.data.shard import Totals
from ptm.data.tokenizer import Tokenizer, load_tokenizer
from ptm.inputs import sources
from ptm.jobs import DataJob
from ptm.model.lora_config import AdapterKind
from ptm.recipe import Recipe
from ptm.trainer.config import ObjectiveKind
from ptm.tuning import base_tokenizer, tokenizer_folder


def data(job: DataJob) -> None:
    """prepare, check or show what a recipe learns from."""
    config = base_tokenizer(job)
    if job.mode is ObjectiveKind.pretrain or job.action is DataAction.prepare:
        data_job.run(
            job.action,
            config,
            vocab_size=job.model.vocab_size,
            seq_len=job.train.seq_len,
            seed=job.train.seed,
            isolate_documents=job.model.isolate_documents,
            row=job.row,
        )
        return
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        vocab_size, seed = job.model.vocab_size, job.train.seed
        tokenizer = open_corpus(config, vocab_size=vocab_size, seed=seed).tokenizer
    console = Console(highlight=False, soft_wrap=True)
    if job.action is DataAction.check:
        check(job, config, tokenizer, console)
    else:
        show(job, config, tokenizer, console)


def open_rows(
    recipe: Recipe, config: DataConfig, tokenizer: Tokenizer, on_bad: OnBad = ignore
) -> Conversations | Sides:
    """Both sides of what the mode learns from, encoded. Raises: DataError."""
    seed, longest = recipe.train.seed, recipe.train.seq_len + 1
    folder = tokenizer_folder(recipe.train.init_from)
    with chat_template(recipe.sft, tokenizer, folder) as template:
        if recipe.mode is ObjectiveKind.sft:
            return open_conversations(
                recipe.sft,
                config,
                tokenizer,
                template,
                most_tokens=longest - num_soft(recipe),
                is_shown=True,
                on_bad=on_bad,
            )
        is_dpo = recipe.mode is ObjectiveKind.dpo
        of, opened = (recipe.dpo, open_pairs) if is_dpo else (recipe.grpo, open_prompts)
        room = longest if is_dpo else longest - recipe.grpo.max_new_tokens
        maker = Maker(tokenizer, template, room)
        more = {} if is_dpo else {"reward": recipe.grpo.reward}
        return opened(
            of.source, of.tasks, of.task_rows, config, maker, seed=seed, on_bad=on_bad, **more
        )


def num_soft(recipe: Recipe) -> int:
    """Soft tokens before each document."""
    return recipe.adapter.prompt_tokens if recipe.adapter.kind is AdapterKind.prompt else 0


def check(job: DataJob, config: DataConfig, tokenizer: Tokenizer, console: Console) -> None:
    """List every bad row as file:line: reason, and count.

    Raises: DataError when more are bad than the recipe accepts, or all.
    """
    bad: list[tuple[str, str, str]] = []
    num_bad = 0

    def on_bad(where: str, reason: str, num_rows: int) -> None:
        nonlocal num_bad
        console.print(f"{where}: {reason}", markup=False)
        path, _, number = where.rpartition(":")
        bad.append((path, number, reason))
        num_bad += num_rows

    lenient = replace(config, bad_rows=BadRows.skip, max_bad_fraction=1.0)
    rows = open_rows(job, lenient, tokenizer, on_bad)
    source = ",".join(sources(job))
    num_good = len(rows.train) + len(rows.held_out)
    console.print(f"{source}: {num_good} rows, {num_bad} bad rows", markup=False)
    refuse_bad(config, source, Totals(num_good, bad_rows=num_bad), bad, f"{job.mode}.source")


def show(job: DataJob, config: DataConfig, tokenizer: Tokenizer, console: Console) -> None:
    """Print row `row` of training; a token is dim where no loss asks for it."""
    rows = open_rows(job, config, tokenizer)
    seed = job.train.seed
    if isinstance(rows, Conversations):
        packed = PackedRows(
            rows.train,
            seq_len=job.train.seq_len,
            seed=seed,
            filler_id=tokenizer.eod_id,
            num_soft=num_soft(job),
        )
        _, epoch, number = packed.locate(job.row)
        found = [rows.train[place.document] for place in packed.rows[number]]
        shown = [(Path(one.conversation.where).name, one.tokens, one.learned) for one in found]
    else:
        _, epoch, number = Order(rows.train, seed).locate(job.row)
        one = rows.train[number]
        name = Path(one.where).name
        if isinstance(one, Prompt):
            shown = [(f"{name}: answer {one.answer!r}", one.ids, [False] * len(one.ids))]
        else:
            sides = {"chosen": one.chosen, "rejected": one.rejected}
            shown = [(f"{name}: {k}", a.tokens, a.learned) for k, a in sides.items()]
    # The first token is nobody's label.
    learned = [[False, *map(bool, mask[1:])] for _, _, mask in shown]
    console.print(
        f"row {job.row}: row {number} of epoch {epoch}; {sum(map(len, learned))} tokens, "
        f"{len(shown)} documents, {sum(map(sum, learned))} labels with loss, dim ones without",
        markup=False,
    )
    for (title, tokens, _), mask in zip(shown, learned):
        data_job.show_tokens(title, tokens, mask, tokenizer, console)
