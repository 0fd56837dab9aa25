"""Fine-tuning modes: conversations, replayed text, and what they come to (ptm/modes.py)."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ptm.checkpoint.expert_rows import export_words
from ptm.common.errors import CheckpointError, DataError, line
from ptm.data.chat import ChatTemplate
from ptm.data.config import DataConfig
from ptm.data.conversations import BadSeen
from ptm.data.loader import Loader
from ptm.data.pack import Batch
from ptm.data.sft import Encoded, PackedRows, chat_template, open_conversations
from ptm.eval.answers import exact_answers
from ptm.mesh.mesh import Mesh
from ptm.parts import say, say_if
from ptm.quant.grid import GridKind
from ptm.recipe import Recipe
from ptm.recipe_files import shipped
from ptm.trainer.config import ObjectiveKind
from ptm.trainer.loop import Batches as StepBatches
from ptm.trainer.objectives import ReplayBatch

HELD_OUT_SEED = 0


def base_tokenizer(recipe: Recipe) -> DataConfig:
    """The data section with the tokenizer of the model that is fine-tuned. Raises
    CheckpointError where that model is not there."""
    data, base = recipe.data, recipe.train.init_from
    if recipe.mode is ObjectiveKind.pretrain or base is None:
        return data
    if not Path(base).is_dir():
        rule = "is not there, and fine-tuning starts from it"
        made_by = Path(base).name.rpartition("-")[0]  # runs are named RECIPE-SCALE
        named = made_by if made_by in shipped() else "m32"
        command = f"ptm train recipe={named} model.scale={recipe.model.scale}"
        remedy = f"run `{command}` first, or name a model's folder"
        if recipe.adapter.has_codes:
            words = export_words(GridKind(recipe.adapter.base))
            remedy = f"make one with `ptm export RUN {words}`, or name one"
        if (recipe.run_dir / "checkpoints").is_dir():
            rule, remedy = "is not there, and this run began with its weights", "put it back"
        raise CheckpointError(line("train.init_from", base, rule, remedy))
    folder = tokenizer_folder(base)
    if data.tokenizer is not None or folder is None:
        return data
    return replace(data, tokenizer=str(folder))


def tokenizer_folder(base: str | None) -> Path | None:
    """Where a model folder, a run or a checkpoint has its tokenizer."""
    for folder in (Path(base), Path(base) / "tokenizer") if base is not None else ():
        if (folder / "tokenizer.json").is_file() or list(folder.glob("*.model")):
            return folder
    return None


class Rows:
    """This rank's packed rows of conversations, on the device that computes."""

    def __init__(
        self, rows: PackedRows, mesh: Mesh, *, num_rows: int, micro: int, prefetch: int = 0
    ) -> None:
        self.rows, self.num_rows, self.device = rows, num_rows, mesh.device
        self.loader = Loader(
            rows,
            rows_per_step=num_rows,
            rank=mesh.rank,
            world=mesh.world,
            micro_batch_size=micro,
            prefetch=prefetch,
        )

    def micro_batches(self, step: int) -> list[Batch]:
        batches = self.loader.micro_batches(step)
        return [Batch(*(tensor.to(self.device) for tensor in batch)) for batch in batches]

    def learned(self, step: int) -> int:
        """Labels with loss in a step, over all ranks."""
        return self.rows.num_learned(step * self.num_rows, (step + 1) * self.num_rows)


@dataclass(frozen=True)
class Replaying:
    """A mode's batches, then rows of text whose mean loss weighs `weight` beside the mode's."""

    batches: StepBatches
    text: StepBatches
    weight: float
    text_tokens: int
    "Of a step, over all ranks."
    counted: Callable[[int], float]
    "What the mode divides a step by."

    def micro_batches(self, step: int) -> list[Any]:
        weight = self.weight * self.counted(step) / self.text_tokens
        text = [ReplayBatch(batch, weight) for batch in self.text.micro_batches(step)]
        return [*self.batches.micro_batches(step), *text]


def questions(
    documents: list[Encoded], template: ChatTemplate, tokenizer: Any, *, count: int, longest: int
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer with its end) of held-out conversations of one turn with a short answer."""
    found = []
    for one in documents:
        if len(found) == count:
            break
        prompt = template.encode_prompt(one.conversation.messages[:-1], tokenizer)
        answer = one.tokens[len(prompt) :].tolist()
        is_one = one.tokens[: len(prompt)].tolist() == prompt and one.learned[len(prompt) :].all()
        if is_one and 0 < len(answer) <= longest:
            found.append((prompt, answer))
    if count and not found:
        rule = "no held-out answer is as short, so exact ones cannot be counted"
        remedy = "raise it, or set sft.answers=0"
        raise DataError(line("sft.answer_tokens", longest, rule, remedy))
    return found


class Sft:
    """Conversations of one run: rows to train on, and the evaluation of the held-out side."""

    def __init__(self, recipe: Recipe, mesh: Mesh, tokenizer: Any, model: Any) -> None:
        sft, train = recipe.sft, recipe.train
        self.recipe, self.mesh, self.tokenizer, self.model = recipe, mesh, tokenizer, model
        soft, bad = model.soft_ids, BadSeen()
        most_tokens = train.seq_len + 1 - len(soft)
        with chat_template(sft, tokenizer, tokenizer_folder(train.init_from)) as template:
            found = open_conversations(
                sft,
                recipe.data,
                tokenizer,
                template,
                most_tokens=most_tokens,
                is_shown=mesh.is_main,
                on_bad=bad,
            )
            asked = questions(
                found.held_out, template, tokenizer, count=sft.answers, longest=sft.answer_tokens
            )
        self.questions = [([*soft, *prompt], answer) for prompt, answer in asked]
        packed = functools.partial(
            PackedRows, seq_len=train.seq_len, filler_id=tokenizer.eod_id, num_soft=len(soft)
        )
        self.train = packed(found.train, seed=train.seed)
        held_out = packed(found.held_out, seed=HELD_OUT_SEED)
        num_rows = min(recipe.eval.rows, held_out.num_rows)
        self.held_out = Rows(held_out, mesh, num_rows=num_rows, micro=train.micro_batch_size)
        say_if(bad.told)
        cut = f", {found.num_cut:,} cut to {most_tokens} tokens" if found.num_cut else ""
        say(
            f"{len(found.train):,} conversations in {self.train.num_rows:,} rows{cut}; "
            f"{len(found.held_out):,} held out, of which {len(self.questions):,} are answered"
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """task_loss (nats an answer's token) and exact_answers (share), of the held-out side."""
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for batch in self.held_out.micro_batches(0):
            loss = self.model.loss(batch)
            sums += torch.stack([loss.nll_sum.double(), loss.tokens.double()])
        nll, tokens = self.mesh.sum_counts(sums).tolist()
        exact = exact_answers(
            self.model,
            self.questions,
            max_new=self.recipe.sft.answer_tokens,
            eod_id=self.tokenizer.eod_id,
            mesh=self.mesh,
        )
        self.model.train(was_training)
        return {"task_loss": nll / max(tokens, 1), "exact_answers": exact}


class BeforeAfter:
    """Evaluates before the first step, remembers it over resumes, and shows both at the end."""

    def __init__(
        self, path: Path, evaluate: Callable[[], dict[str, float]], names: dict[str, str]
    ) -> None:
        """names: of the evaluation's numbers, key -> what it is called."""
        self.path, self._evaluate, self.names = path, evaluate, names
        self.last: dict[str, float] | None = None

    def begin(self, *, step: int, is_main: bool) -> None:
        """On every rank, before the first step."""
        if step == 0:
            before = self.evaluate()
            if is_main:
                plain = {k: v if math.isfinite(v) else None for k, v in before.items()}
                self.path.write_text(json.dumps(plain, indent=1) + "\n")

    def evaluate(self) -> dict[str, float]:
        self.last = self._evaluate()
        return self.last

    def table(self) -> None:
        """Print what changed; on every rank."""
        after = self.last or self.evaluate()
        before = json.loads(self.path.read_text()) if self.path.is_file() else {}
        say(f"\n{'held out':34} {'before':>9} {'after':>9}")
        for key, name in self.names.items():
            was = before.get(key)
            say(f"{name:34} {math.nan if was is None else was:9.4f} {after[key]:9.4f}")
