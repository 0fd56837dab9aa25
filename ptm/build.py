"""The wiring: what each verb does with its config, in the order of the data flow.

This is the only file that knows all parts. It decides nothing that a part could decide; it opens
the mesh, hands callables from job to job (the trainer gets `save` and `evaluate`), and closes
everything in the reverse order.

    recipe -> plan (refuse before anything is allocated) -> mesh -> run folder -> data -> model ->
    engine
           -> weights (resume | init_from | new) -> loop -> last evaluation, sample, report
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptm import run_folder
from ptm.checkpoint.load import load, newest_good
from ptm.checkpoint.open_model import open_model
from ptm.checkpoint.commit import preflight
from ptm.checkpoint.save import Saved, Saver
from ptm.checkpoint.source import check_shapes
from ptm.checkpoint.weights import model_to_json
from ptm.common import env, incident
from ptm.common.device import peak_flops
from ptm.common.parse import schema_of
from ptm.common.plan import Plan
from ptm.data.corpus import Corpus, Split, open_corpus
from ptm.data.loader import Loader, Rows
from ptm.data.pack import Batch
from ptm.engine.zero1 import Zero1Engine
from ptm.eval.perplexity import held_out
from ptm.mesh.mesh import Mesh, open_mesh
from ptm.mesh.peers import Peers
from ptm.model.config import ModelConfig, Scale, flops_per_token
from ptm.model.init import new_weight
from ptm.model.transformer import Transformer
from ptm.optim.adamw import adamw
from ptm.parallel.recompute import recompute_blocks
from ptm.planner.explain import plan_run
from ptm.recipe import Recipe, describe_difference, load_recipe
from ptm.recipe_files import shipped
from ptm.report.html import write_report
from ptm.serve.generator import Sampling, stream_text
from ptm.trainer.config import Precision, Recompute, TrainConfig
from ptm.trainer.loop import Run, fit
from ptm.trainer.metrics import Metrics
from ptm.trainer.objectives import OBJECTIVES, ObjectiveKind
from ptm.trainer.state import TrainState

SAMPLE = Sampling(prompt="import os\n\n\ndef ", max_new_tokens=160, temperature=0.7, top_p=0.9)
DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


def train(recipe: Recipe) -> None:
    """Train to the last step, or until asked to stop. Leaves a checkpoint, a sample and a
    report."""
    plan = make_plan(recipe)
    _say(describe_difference(recipe) + "\n\n" + plan.text())
    if recipe.dry_run:
        return
    with open_run(recipe, plan) as parts:
        if parts.run.state.step < recipe.train.steps:
            fit(parts.run)
        else:
            _say(f"complete after {parts.run.state.step} steps; raise train.steps to go on")
        parts.saver.wait()
        finish(recipe, parts)


def make_plan(recipe: Recipe, *, ranks: env.Ranks | None = None, hardware: str | None = None) -> Plan:
    """The plan on this machine, or a described one. Raises PlanError, with a table, if it does not fit."""
    return plan_run(
        recipe.model,
        recipe.train,
        recipe.engine,
        recipe.checkpoint,
        ranks=ranks or env.ranks(),
        hardware=hardware,
        folders=[path.parent / "hardware" for path in list(shipped().values())[:1]],
        others=_other_scales(recipe),
    )


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
    corpus: Corpus
    model: Transformer
    saver: Saver


@contextmanager
def open_run(recipe: Recipe, plan: Plan) -> Iterator[Parts]:
    """Everything of one run, closed in the reverse order."""
    with ExitStack() as stack:
        mesh = open_mesh(recipe.engine.timeout_s)
        stack.callback(mesh.close)
        peers = Peers(mesh.background)
        on_main = functools.partial(_on_main, peers)
        checkpoints = recipe.run_dir / "checkpoints"
        on_main(lambda: run_folder.claim(recipe, stack))
        incident.set_run_dir(recipe.run_dir)
        keep, size = recipe.checkpoint.keep, plan.checkpoint_bytes
        _say_if(on_main(lambda: preflight(checkpoints, size, keep=keep)))
        corpus = open_corpus(
            recipe.data,
            vocab_size=recipe.model.vocab_size,
            seed=recipe.train.seed,
            is_builder=mesh.is_main,
            show_progress=mesh.is_main,
        )
        model, engine = _build_model(recipe, mesh)
        state = _first_weights(recipe, checkpoints, engine, peers)
        on_main(lambda: run_folder.describe(recipe, plan.text()))
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
            on_saved=functools.partial(_note_saved, metrics),
        )
        stack.callback(saver.close)
        saver.prepare(engine.state())
        metrics.event("resume" if state.step else "start", step=state.step, world=mesh.world)
        num_rows = recipe.train.batch_tokens // recipe.train.seq_len
        rows = functools.partial(
            Batches,
            mesh=mesh,
            seq_len=recipe.train.seq_len,
            isolate_documents=recipe.model.isolate_documents,
            micro_batch_size=recipe.train.micro_batch_size,
        )
        batches = stack.enter_context(
            rows(corpus.train, num_rows=num_rows, prefetch=recipe.data.prefetch)
        )
        held_out_batches = rows(corpus.held_out, num_rows=recipe.eval.rows)
        tokenizer_folder = recipe.run_dir / "tokenizer"
        on_main(lambda: corpus.tokenizer.save(tokenizer_folder))
        run = Run(
            train=recipe.train,
            mesh=mesh,
            engine=engine,
            objective=OBJECTIVES[ObjectiveKind.pretrain],
            batches=batches,
            state=state,
            metrics=metrics,
            flops_per_token=flops_per_token(recipe.model, recipe.train.seq_len),
            peak_flops=peak_flops(mesh.device, DTYPES[recipe.train.precision]),
            save_every=recipe.checkpoint.interval,
            evaluate_every=recipe.eval.interval,
            save=functools.partial(_save, recipe, engine, saver, tokenizer_folder),
            evaluate=functools.partial(_evaluate, model, corpus, held_out_batches, mesh),
        )
        yield Parts(run, corpus, model, saver)


def finish(recipe: Recipe, parts: Parts) -> None:
    """After the last step: say how good the model is, show a sample, write the report. Rank 0."""
    if not parts.run.mesh.is_main:
        return
    parts.run.metrics.close()
    best = parts.run.state.best_bits_per_byte
    _say(f"held-out bits per byte: {best:.4f} at best" if best is not None else "not evaluated")
    _say(f"a sample, temperature {SAMPLE.temperature}:\n")
    for text in stream_text(parts.model, parts.corpus.tokenizer, SAMPLE):
        print(text, end="", flush=True)
    _say(f"\n\nreport: {write_report(recipe.run_dir)}")
    _say(f"more:   ptm generate {recipe.run_dir} prompt='import '")


def _say(text: str) -> None:
    if env.ranks().rank == 0:
        print(text, flush=True)


def _say_if(text: str | None) -> None:
    if text:
        _say(text)


def _on_main(peers: Peers, task: Callable[[], Any]) -> Any:
    """Rank 0's result of `task` on every rank; an error of it is raised on all."""
    return peers.together(lambda: task() if peers.rank == 0 else None)[0]


def _build_model(recipe: Recipe, mesh: Mesh) -> tuple[Transformer, Zero1Engine]:
    dtype = DTYPES[recipe.train.precision]
    model = Transformer(recipe.model, dtype=dtype, device=mesh.device)
    if recipe.train.recompute is Recompute.block:
        recompute_blocks(model.model.layers)
    update = functools.partial(adamw, config=recipe.optim)
    engine = Zero1Engine(
        model, mesh=mesh, config=recipe.engine, update=update, clip=recipe.train.clip
    )
    return model, engine


def _first_weights(
    recipe: Recipe, checkpoints: Path, engine: Zero1Engine, peers: Peers
) -> TrainState:
    """Fill the engine from the newest good checkpoint, another model, or the seed, in that
    order."""
    good = newest_good(checkpoints, peers=peers, repair=True)
    if good is not None:
        for folder, reason in good.rejected:
            _say(f"not used: {folder}: {reason}")
        meta = load(good, engine.state(), peers=peers)
        state = TrainState.from_json(meta["train"])
        engine.updates = state.updates
        _say(f"resuming after step {state.step} from {good.folder}")
    else:
        state = TrainState(run_id=_on_main(peers, lambda: uuid.uuid4().hex))
        initial = _initial_weights(recipe)
        for _, slot in engine.slots():
            engine.fill(slot.name, initial(slot.name, slot.shape))
    engine.publish()
    return state


def _initial_weights(recipe: Recipe) -> Callable[[str, torch.Size], Tensor]:
    """Name and shape -> the whole fp32 tensor that a new run starts with."""
    if recipe.train.init_from is None:
        return lambda name, shape: new_weight(recipe.model, name, shape, recipe.train.seed)
    opened = open_model(Path(recipe.train.init_from))
    wanted = Transformer(recipe.model, device="meta").state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    check_shapes(opened.weights, shapes, Path(recipe.train.init_from))
    _say(f"starting from the weights in {recipe.train.init_from}")
    return lambda name, shape: opened.weights.read(name).float()


class Batches:
    """This rank's rows of a split, on the device that computes. Close it, or use a `with`."""

    def __init__(
        self,
        split: Split,
        mesh: Mesh,
        *,
        seq_len: int,
        isolate_documents: bool,
        num_rows: int,
        micro_batch_size: int,
        prefetch: int = 0,
    ) -> None:
        """`num_rows` a step over all ranks; of held-out rows, at most as many as there are."""
        rows = Rows(split, seq_len=seq_len, isolate_documents=isolate_documents)
        self.device = mesh.device
        self.loader = Loader(
            rows,
            rows_per_step=min(num_rows, rows.num_rows) if split.name == "held-out" else num_rows,
            rank=mesh.rank,
            world=mesh.world,
            micro_batch_size=micro_batch_size,
            prefetch=prefetch,
        )

    def micro_batches(self, step: int) -> list[Batch]:
        batches = self.loader.micro_batches(step)
        return [Batch(*(tensor.to(self.device) for tensor in batch)) for batch in batches]

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()


def _save(
    recipe: Recipe,
    engine: Zero1Engine,
    saver: Saver,
    tokenizer_folder: Path,
    state: TrainState,
    *,
    is_best: bool,
    block: bool,
) -> None:
    saver.save(
        engine.state(),
        step=state.step,
        meta={"train": state.to_json(), "model": model_to_json(recipe.model)},
        attachments={"tokenizer": tokenizer_folder},
        expected=_names(engine.model),
        is_best=is_best,
        block=block,
    )


def _names(model: Transformer) -> set[str]:
    """What a checkpoint must hold, from the model and not from the engine that it checks."""
    kinds = ("model.", "optim.exp_avg.", "optim.exp_avg_sq.")
    return {kind + name for kind in kinds for name, _ in model.named_parameters()}


def _note_saved(metrics: Metrics, saved: Saved) -> None:
    notes = {"notes": "; ".join(saved.notes)} if saved.notes else {}
    metrics.event(
        "checkpoint",
        step=saved.step,
        folder=saved.folder.name,
        bytes=saved.num_bytes,
        took_s=round(saved.took_s, 3),
        blocked_s=round(saved.blocked_s, 3),
        **notes,
    )


def _evaluate(model: Transformer, corpus: Corpus, batches: Batches, mesh: Mesh) -> dict[str, float]:
    token_bytes = torch.as_tensor(corpus.tokenizer.token_bytes(), device=mesh.device)
    return held_out(model, batches.micro_batches(0), token_bytes=token_bytes, mesh=mesh)
