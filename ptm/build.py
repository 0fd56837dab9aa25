"""The wiring of a training run, in the order of the data flow.

With ptm/parts.py it knows all parts. It decides nothing that a part could decide; it opens the
mesh, hands callables from job to job (the trainer gets `save` and `evaluate`), and closes
everything in the reverse order.

    recipe -> plan (refuse before anything is allocated) -> mesh -> run folder -> data -> model
           -> engine -> weights (resume | init_from | new) -> mode (batches, objective, evaluate)
           -> loop -> sample, report
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ptm import run_folder
from ptm.checkpoint.save import Saver
from ptm.common import env, incident
from ptm.common.agent import stop_with_agent
from ptm.common.device import peak_flops
from ptm.common.parse import schema_of
from ptm.common.plan import Plan
from ptm.data.corpus import Corpus, open_corpus
from ptm.inputs import refuse_absent
from ptm.kernels import native
from ptm.kernels.linear import product_dtype
from ptm.kernels.shm import make_port
from ptm.mesh.mesh import open_mesh
from ptm.mesh.peers import Peers
from ptm.model.config import ModelConfig, Scale, flops_per_token
from ptm.model.transformer import Transformer
from ptm.modes import Mode, Setup, open_mode
from ptm.parts import (
    DTYPES,
    Start,
    build_model,
    first_weights,
    note_saved,
    on_main,
    room_for_checkpoints,
    save,
    say,
    say_if,
)
from ptm.planner.explain import plan_run
from ptm.recipe import Recipe, describe_difference, dump, load_recipe
from ptm.recipe_files import shipped
from ptm.report.html import write_report
from ptm.serve.generator import Sampling, stream_text
from ptm.trainer.config import BY_TOKEN, ObjectiveKind, TrainConfig
from ptm.trainer.loop import Run, fit
from ptm.trainer.metrics import Metrics
from ptm.trainer.signals import StopRequest, leaving_at_once
from ptm.tuning import base_tokenizer

BEFORE = "stopped before the first step of this start"
SAMPLE = Sampling(prompt="import os\n\n\nclass", max_new_tokens=160, temperature=0.8, top_p=0.9)


def train(recipe: Recipe) -> None:
    """Train to the last step, or until asked to stop. Leaves a checkpoint, a sample and a
    report."""
    stop = StopRequest()
    with leaving_at_once(stop, BEFORE, "the same command goes on"):
        stop_with_agent()
        plan = make_plan(recipe)
        if recipe.dry_run:
            say(f"{dump(recipe)}\n{plan.text()}")
            return
        refuse_absent(recipe)
        say(f"{describe_difference(recipe)}\n\n{plan.text()}")
        with open_run(recipe, plan, stop) as parts:
            if parts.run.state.step < recipe.train.steps:
                fit(parts.run)
            else:
                say(f"complete after {parts.run.state.step} steps; raise train.steps to go on")
            remedy = "the same command makes the sample and the report"
            with leaving_at_once(StopRequest(), "stopped after the last step", remedy):
                parts.saver.wait()
                finish(recipe, parts)


def make_plan(
    recipe: Recipe,
    *,
    ranks: env.Ranks | None = None,
    hardware: str | None = None,
    may_measure: bool = False,
) -> Plan:
    """The plan on this machine or a described one; may_measure: take seconds to learn how fast it
    is. Raises PlanError if it does not fit."""
    return plan_run(
        recipe.model,
        recipe.train,
        recipe.engine,
        recipe.checkpoint,
        recipe.adapter,
        has_log_probs=recipe.mode in BY_TOKEN,
        frozen_copy=frozen_copy(recipe),
        ranks=ranks or env.ranks(),
        hardware=hardware,
        folders=hardware_folders(),
        others=_other_scales(recipe),
        may_measure=may_measure,
    )


def frozen_copy(recipe: Recipe) -> str:
    """The key that has every rank hold a frozen copy of the model (ptm/modes.py), if one does."""
    if recipe.mode is ObjectiveKind.grpo and recipe.grpo.kl_coef > 0:
        return "grpo.kl_coef"
    return "qat.distill" if recipe.mode is ObjectiveKind.pretrain and recipe.qat.distill else ""


def hardware_folders() -> list[Path]:
    """Where descriptions of machines are."""
    return [path.parent / "hardware" for path in list(shipped().values())[:1]]


def _other_scales(recipe: Recipe) -> Iterator[tuple[str, ModelConfig, TrainConfig]]:
    for scale in (Scale.full, Scale.mini, Scale.debug):
        if scale is not recipe.model.scale:
            word = f"model.scale={scale}"
            other = load_recipe([f"recipe={recipe.recipe}", word])
            yield word, other.model, other.train


@dataclass
class Parts:
    """What `finish` needs after the loop."""

    run: Run
    mode: Mode
    corpus: Corpus
    model: Transformer
    saver: Saver


@contextmanager
def open_run(recipe: Recipe, plan: Plan, stop: StopRequest) -> Iterator[Parts]:
    """Everything of one run, closed in the reverse order."""
    with ExitStack() as stack:
        mesh = open_mesh(recipe.engine.timeout_s, recipe.engine.ep, make_port)
        stack.callback(mesh.close)
        peers = Peers(mesh.background)
        checkpoints = recipe.run_dir / "checkpoints"
        on_main(peers, lambda: run_folder.claim(recipe, stack))
        incident.set_run_dir(recipe.run_dir)
        say_if(on_main(peers, lambda: room_for_checkpoints(recipe, plan)))
        corpus = open_corpus(
            base_tokenizer(recipe),
            vocab_size=recipe.model.vocab_size,
            seed=recipe.train.seed,
            is_builder=mesh.is_main,
            show_progress=mesh.is_main,
        )
        run_id = on_main(peers, lambda: run_folder.identify(recipe.run_dir))
        model, engine = build_model(recipe, mesh, plan, peers, run_id=run_id)
        stack.push(lambda kind, *_: engine.close(is_failing=kind is not None))
        start = Start(recipe, peers)
        state = first_weights(
            recipe, checkpoints, engine, peers, start, run_id=run_id, encode=corpus.tokenizer.encode
        )
        kernels = native.table(mesh.device.type)
        on_main(peers, lambda: run_folder.describe(recipe, plan.text(), kernels))
        say(native.summary(mesh.device.type))
        if mesh.world > 1:
            say(f"collectives: {mesh.transport}")
        metrics = Metrics(
            recipe.run_dir,
            recipe.log,
            total_steps=recipe.train.steps,
            start_step=state.step,
            is_main=mesh.is_main,
            run_name=recipe.name,
            header=schema_of(Recipe).flatten(recipe),
        )
        stack.enter_context(metrics)
        saver = Saver(
            checkpoints,
            recipe.checkpoint,
            run_id=state.run_id,
            peers=peers,
            stream=recipe.engine.ssd_path is not None,
            on_saved=functools.partial(note_saved, metrics),
        )
        stack.callback(saver.close)
        saver.prepare(engine.state())
        peak = peak_flops(mesh.device, product_dtype(mesh.device, DTYPES[recipe.train.precision]))
        metrics.event(
            "resume" if state.step else "start",
            step=state.step,
            world=mesh.world,
            peak_gflops_per_rank=round(peak / 1e9, 1),
        )
        mode = open_mode(
            Setup(recipe, mesh, peers, start, corpus, model, metrics, state.step, stack, stop)
        )
        tokenizer_folder = recipe.run_dir / "tokenizer"
        on_main(peers, lambda: corpus.tokenizer.save(tokenizer_folder))
        run = Run(
            train=recipe.train,
            mesh=mesh,
            engine=engine,
            objective=mode.objective,
            batches=mode.batches,
            state=state,
            metrics=metrics,
            flops_per_token=flops_per_token(recipe.model, recipe.train.seq_len),
            peak_flops=peak,
            save_every=recipe.checkpoint.interval,
            evaluate_every=recipe.eval.interval,
            save=functools.partial(save, recipe, engine, saver, tokenizer_folder, start),
            evaluate=mode.evaluate,
            metric_names=mode.metric_names,
            summary=mode.summary,
            best_key=mode.best_key,
            stop=stop,
        )
        yield Parts(run, mode, corpus, model, saver)


def finish(recipe: Recipe, parts: Parts) -> None:
    """After the last step: say how good the model is, show a sample, write the report."""
    is_main = parts.run.mesh.is_main
    parts.run.metrics.close()
    best, name = parts.run.state.best, parts.mode.best_name
    told = None if best is None else best * parts.mode.best_sign + 0.0  # no -0
    say(f"{name}: {told:.4f} at best" if told is not None else "not evaluated")
    if parts.mode.finish is not None:
        parts.mode.finish()
    tokenizer = parts.corpus.tokenizer
    asked = [i for i in parts.mode.asked if i >= 0]  # stream_text puts soft tokens before it
    is_text = recipe.mode is ObjectiveKind.pretrain
    sample, more = SAMPLE, "prompt='import '" if is_text else "question='...'"
    if asked:
        shown = f"{tokenizer.decode(asked)}\n-> "
        sample = Sampling(shown, tuple(asked), max_new_tokens=64)
    what = "an answer to a held-out question" if asked else "a sample"
    say(f"{what}, temperature {sample.temperature}:\n")
    # Weights are sharded: every rank makes the sample, one shows it.
    # Each token takes all weights; where they come from a disk every time, a few must do.
    is_paged = recipe.engine.ssd_path is not None and recipe.engine.cpu_bytes is not None
    sampling = replace(sample, max_new_tokens=16) if is_paged else sample
    for text in stream_text(parts.model, tokenizer, sampling):
        print(text if is_main else "", end="", flush=True)
    if not is_main:
        return
    say(f"\n\nreport: {write_report(recipe.run_dir)}")
    say(f"more:   ptm generate {shlex.quote(str(recipe.run_dir))} {more}")
