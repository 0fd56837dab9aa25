"""Training modes: what `mode` in a recipe stands for. One loop runs them all.

A mode is a source of batches, an objective, and what to evaluate; `MODES` maps each kind to the
function that makes it from what is open already (`Setup`). Batches are a pure function of the step,
so order, resume and ranks need nothing from a mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from ptm.checkpoint.load_model import module_of
from ptm.common.errors import RecipeError, line
from ptm.data.chat import ChatTemplate
from ptm.data.conversations import BadSeen
from ptm.data.corpus import Corpus, Split
from ptm.data.preferences import Maker, open_pairs, open_prompts
from ptm.data.rewards import Rewarder
from ptm.data.sft import chat_template
from ptm.mesh.mesh import Mesh
from ptm.mesh.peers import Peers
from ptm.model.transformer import Transformer
from ptm.parts import DTYPES, Batches, Start, evaluate, say, say_if
from ptm.policies import Pairs, Rollouts
from ptm.recipe import Recipe
from ptm.run_folder import REWARD_LOG
from ptm.trainer.config import ObjectiveKind
from ptm.trainer.loop import Batches as StepBatches
from ptm.trainer.loop import Summary, per_token
from ptm.trainer.metrics import Metrics
from ptm.trainer.objectives import (
    OBJECTIVES,
    PREFERENCE_METRICS,
    REPLAY_METRICS,
    ROLLOUT_METRICS,
    Objective,
    distilled,
    per_rollout,
    preferring,
    replaying,
    rewarded,
)
from ptm.trainer.signals import StopRequest
from ptm.tuning import BeforeAfter, Replaying, Rows, Sft, tokenizer_folder


@dataclass(frozen=True)
class Setup:
    """What a mode is made from; all of it is open, and the model has its weights."""

    recipe: Recipe
    mesh: Mesh
    peers: Peers
    start: Start
    corpus: Corpus
    model: Transformer
    metrics: Metrics
    step: int
    "Steps that are done: 0 in a new run."
    stack: ExitStack
    "Closes what a mode opens."
    stop: StopRequest

    def text(self, split: Split, *, num_rows: int, prefetch: int = 0) -> Batches:
        """This rank's rows of a split of the corpus, closed with the run."""
        batches = Batches(
            split,
            self.mesh,
            seq_len=self.recipe.train.seq_len,
            isolate_documents=self.recipe.model.isolate_documents,
            micro_batch_size=self.recipe.train.micro_batch_size,
            num_rows=num_rows,
            prefetch=prefetch,
            num_soft=len(self.model.soft_ids),
        )
        return self.stack.enter_context(batches)

    def held_out_text(self) -> Callable[[], dict[str, float]]:
        """Loss and bits per byte of the corpus's held-out text."""
        batches = self.text(self.corpus.held_out, num_rows=self.recipe.eval.rows)
        return functools.partial(evaluate, self.model, self.corpus, batches, self.mesh)

    @property
    def rows_per_step(self) -> int:
        return self.recipe.train.batch_tokens // self.recipe.train.seq_len


@dataclass(frozen=True)
class Mode:
    """What the loop gets of a mode; see ptm/trainer/loop.py's Run for the last four."""

    objective: Objective
    batches: StepBatches
    evaluate: Callable[[], dict[str, float]]
    metric_names: tuple[str, ...] = ()
    summary: Summary = per_token
    best_key: str = "eval_bits_per_byte"
    best_name: str = "held-out bits per byte"
    best_sign: int = 1
    "-1 where the value under best_key is what is told, negated."
    finish: Callable[[], None] | None = None
    "Run on every rank after the last step, before the sample and the report."
    asked: Sequence[int] = ()
    "A held-out question whose answer is the sample, in tokens; without one it is text."


def open_mode(setup: Setup) -> Mode:
    """The mode of a recipe."""
    return MODES[setup.recipe.mode](setup)


def pretrain(setup: Setup) -> Mode:
    """Text, packed; the loss of every token."""
    prefetch = setup.recipe.data.prefetch
    batches = setup.text(setup.corpus.train, num_rows=setup.rows_per_step, prefetch=prefetch)
    held_out = setup.held_out_text()
    qat, init_from = setup.recipe.qat, setup.recipe.train.init_from
    if not qat.distill:
        return Mode(OBJECTIVES[ObjectiveKind.pretrain], batches, held_out)
    assert init_from is not None
    weights = setup.start.open()._replace(model=setup.recipe.model)
    teacher = module_of(weights, init_from, dtype=torch.bfloat16).to(setup.mesh.device)
    objective = distilled(teacher.requires_grad_(False), qat.distill)
    return Mode(objective, batches, held_out, metric_names=("kl",))


def with_replay(setup: Setup, mode: Mode, counted: Callable[[int], float]) -> Mode:
    """`mode` with data.replay's text beside its batches. counted(step): what it divides by."""
    recipe = setup.recipe
    weight = recipe.data.replay
    if not weight:
        return mode
    num_rows = max(1, round(weight * setup.rows_per_step))
    text = setup.text(setup.corpus.train, num_rows=num_rows, prefetch=recipe.data.prefetch)
    tokens = num_rows * recipe.train.seq_len

    def summary(sums: Mapping[str, float], tokens: int) -> Mapping[str, float]:
        own = {name: total for name, total in sums.items() if name not in REPLAY_METRICS}
        nll, seen = (sums[name] for name in REPLAY_METRICS)
        return {**mode.summary(own, tokens), "replay_loss": nll / max(seen, 1.0)}

    return replace(
        mode,
        objective=replaying(mode.objective),
        batches=Replaying(mode.batches, text, weight, tokens, counted),
        metric_names=(*mode.metric_names, *REPLAY_METRICS),
        summary=summary,
    )


def sft(setup: Setup) -> Mode:
    """Answers in conversations; text beside them if data.replay asks for it."""
    recipe, mesh = setup.recipe, setup.mesh
    opened = Sft(recipe, mesh, setup.corpus.tokenizer, setup.model)
    rows = Rows(
        opened.train,
        mesh,
        num_rows=setup.rows_per_step,
        micro=recipe.train.micro_batch_size,
        prefetch=recipe.data.prefetch,
    )
    setup.stack.callback(rows.loader.close)
    text = setup.held_out_text()
    both = BeforeAfter(
        recipe.run_dir / "before.json",
        lambda: text() | opened.evaluate(),
        {
            "exact_answers": "exact answers, share",
            "task_loss": "loss of answers",
            "eval_bits_per_byte": "bits per byte of pretraining text",
        },
    )
    both.begin(step=setup.step, is_main=mesh.is_main)
    mode = Mode(
        OBJECTIVES[ObjectiveKind.sft],
        rows,
        both.evaluate,
        best_key="task_loss",
        best_name="held-out loss of answers",
        finish=both.table,
        asked=opened.questions[0][0] if opened.questions else (),
    )
    return with_replay(setup, mode, rows.learned)


def _maker(setup: Setup, template: ChatTemplate, room: int) -> Maker:
    return Maker(setup.corpus.tokenizer, template, room)


def _base(setup: Setup, mode: ObjectiveKind) -> str:
    """Where the run starts from. Raises: RecipeError where nothing is given."""
    base = setup.recipe.train.init_from
    if base is None:
        rule = f"must name a model, as mode={mode} starts from one"
        remedy = "run `ptm train recipe=m32_sft` and give runs/m32_sft-mini"
        raise RecipeError(line("train.init_from", None, rule, remedy))
    return base


def preferences(setup: Setup) -> Mode:
    """DPO; the reference is the initial weights' word on each pair."""
    recipe, mesh, tokenizer = setup.recipe, setup.mesh, setup.corpus.tokenizer
    base = _base(setup, ObjectiveKind.dpo)
    config, bad = recipe.dpo, BadSeen()
    with chat_template(recipe.sft, tokenizer, tokenizer_folder(base)) as template:
        maker = _maker(setup, template, recipe.train.seq_len + 1)
        sides = open_pairs(
            config.source,
            config.tasks,
            config.task_rows,
            recipe.data,
            maker,
            seed=recipe.train.seed,
            on_bad=bad,
        )
    say_if(bad.told)
    pairs = Pairs(recipe, mesh, setup.model, sides, filler_id=tokenizer.eod_id)
    setup.stack.callback(pairs.loader.close)
    pairs.refer(is_new=setup.step == 0)
    say(f"{len(sides.train):,} pairs, {len(pairs.held_out):,} held out")
    text = setup.held_out_text()
    both = BeforeAfter(
        recipe.run_dir / "before.json",
        lambda: text() | pairs.evaluate(),
        {
            "eval_accuracy": "pairs preferred as they should be, share",
            "eval_margin": "margin",
            "eval_bits_per_byte": "bits per byte of pretraining text",
        },
    )
    both.begin(step=setup.step, is_main=mesh.is_main)
    mode = Mode(
        preferring(config),
        pairs,
        both.evaluate,
        metric_names=PREFERENCE_METRICS,
        best_key="eval_dpo_loss",
        best_name="held-out loss of preferences",
        finish=both.table,
        asked=pairs.held_out[0].chosen.prompt if pairs.held_out else (),
    )
    return with_replay(setup, mode, lambda step: pairs.per_step)


def rewards(setup: Setup) -> Mode:
    """GRPO; rollouts through the weights that are trained."""
    recipe, mesh, tokenizer = setup.recipe, setup.mesh, setup.corpus.tokenizer
    base = _base(setup, ObjectiveKind.grpo)
    config, bad = recipe.grpo, BadSeen()
    room = recipe.train.seq_len + 1 - config.max_new_tokens
    with chat_template(recipe.sft, tokenizer, tokenizer_folder(base)) as template:
        maker = _maker(setup, template, room)
        sides = open_prompts(
            config.source,
            config.tasks,
            config.task_rows,
            recipe.data,
            maker,
            seed=recipe.train.seed,
            reward=config.reward,
            on_bad=bad,
        )
    say_if(bad.told)
    log = recipe.run_dir / REWARD_LOG
    rewarder = Rewarder(config.reward, timeout_s=config.reward_timeout_s, log=log)
    setup.stack.enter_context(rewarder)
    reference = None
    if config.kl_coef > 0:
        weights = setup.start.open()._replace(model=recipe.model)
        reference = module_of(weights, base, dtype=DTYPES[recipe.train.precision])
        reference = reference.to(mesh.device).requires_grad_(False)
    rollouts = Rollouts(
        recipe,
        mesh,
        setup.model,
        sides,
        tokenizer=tokenizer,
        rewarder=rewarder,
        reference=reference,
        stop=setup.stop,
    )
    setup.stack.callback(rollouts.loader.close)
    say(f"{len(sides.train):,} prompts, {len(rollouts.held_out):,} held out")
    text = setup.held_out_text()
    both = BeforeAfter(
        recipe.run_dir / "before.json",
        lambda: text() | rollouts.evaluate(),
        {
            "eval_reward": "reward",
            "eval_unended": "answers without an end, share",
            "eval_bits_per_byte": "bits per byte of pretraining text",
        },
    )
    both.begin(step=setup.step, is_main=mesh.is_main)
    mode = Mode(
        rewarded(config),
        rollouts,
        both.evaluate,
        metric_names=ROLLOUT_METRICS,
        summary=per_rollout,
        best_key="eval_cost",
        best_name="held-out reward",
        best_sign=-1,
        finish=both.table,
        asked=rollouts.held_out[0].ids if rollouts.held_out else (),
    )
    return with_replay(setup, mode, rollouts.tokens)


MODES: dict[ObjectiveKind, Callable[[Setup], Mode]] = {
    ObjectiveKind.pretrain: pretrain,
    ObjectiveKind.sft: sft,
    ObjectiveKind.dpo: preferences,
    ObjectiveKind.grpo: rewards,
}
