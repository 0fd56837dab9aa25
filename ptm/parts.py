"""The parts of a run, each made from its sections of the recipe; ptm/build.py joins them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptm import run_folder
from ptm.checkpoint.commit import preflight
from ptm.checkpoint.expert_rows import EXPERTS, expert_rows
from ptm.checkpoint.folders import step_folders
from ptm.checkpoint.hf import Opened
from ptm.checkpoint.load import load, newest_good
from ptm.checkpoint.merged import ADAPTER_KEY, BASE_KEY, adapter_to_json
from ptm.checkpoint.open_model import Base, base_of, open_base
from ptm.checkpoint.save import Saved, Saver
from ptm.checkpoint.source import check_shapes
from ptm.checkpoint.weights import model_to_json
from ptm.common import env
from ptm.common.errors import CheckpointError, as_typed, line
from ptm.common.plan import Plan
from ptm.data.corpus import Corpus, Split
from ptm.data.loader import Loader, Rows
from ptm.data.pack import Batch, with_soft
from ptm.engine.config import EngineKind
from ptm.engine.engine import PagedEngine
from ptm.engine.open_store import TierOpener
from ptm.eval.perplexity import held_out
from ptm.mesh.mesh import Mesh
from ptm.mesh.peers import Peers
from ptm.model.adapter import SOFT_TOKENS, add_adapter, first_ids, use_adapter
from ptm.model.hf_names import EMBEDDING
from ptm.model.init import new_weight
from ptm.model.lora_config import AdapterKind
from ptm.model.transformer import Transformer
from ptm.optim.adamw import AdamW
from ptm.parallel.adapters import adapted_engine
from ptm.parallel.apply import materialize_buffers, put_on_grid, share_experts, units_of
from ptm.parallel.recompute import recompute_blocks
from ptm.planner.job import rows_held
from ptm.recipe import Recipe, Resume
from ptm.run_folder import last_logged_step
from ptm.trainer.config import Precision, Recompute
from ptm.trainer.metrics import Metrics
from ptm.trainer.state import TrainState
from ptm.trainer.step import Engine

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


def say(text: str) -> None:
    if env.ranks().rank == 0:
        print(text, flush=True)


def say_if(text: str | None) -> None:
    if text:
        say(text)


def on_main(peers: Peers, task: Callable[[], Any]) -> Any:
    """Rank 0's result of `task` on every rank; an error of it is raised on all."""
    return peers.together(lambda: task() if peers.rank == 0 else None)[0]


def room_for_checkpoints(recipe: Recipe, plan: Plan) -> str | None:
    """A warning when the disk will fill; raises StorageError when not one checkpoint fits."""
    if not recipe.checkpoint.interval:
        return None
    folder = recipe.run_dir / "checkpoints"
    return preflight(folder, plan.checkpoint_bytes, keep=recipe.checkpoint.keep)


def build_model(
    recipe: Recipe, mesh: Mesh, plan: Plan, peers: Peers, *, run_id: str
) -> tuple[Transformer, Engine]:
    """The model without values, and the engine that owns them, by `engine.kind`."""
    dtype = DTYPES[recipe.train.precision]
    if recipe.engine.kind is not EngineKind.paged:
        return adapted_engine(
            recipe.model,
            mesh=mesh,
            engine=recipe.engine,
            optim=recipe.optim,
            dtype=dtype,
            clip=recipe.train.clip,
            recompute=recipe.train.recompute is Recompute.block,
            adapter=recipe.adapter,
        )
    model = Transformer(recipe.model, dtype=dtype, device="meta")
    add_adapter(model, recipe.adapter)
    held = rows_held(recipe.adapter, dtype.itemsize)
    units = units_of(model, held)
    materialize_buffers(model, mesh.device)
    share_experts(model, mesh, recipe.engine.chunks)
    if recipe.train.recompute is Recompute.block:
        recompute_blocks(model.model.layers)
    # Ranks plan by the memory that each of them sees: the first one's word holds for all.
    zero, tiers = on_main(peers, lambda: [_zero(recipe, plan, mesh.world), plan.tier_bytes])
    budgets = recipe.engine
    if budgets.ssd_path is not None and budgets.cpu_bytes is None:
        # A page more: ranks hold unequal shares, and the plan is of one of them.
        budgets = replace(budgets, cpu_bytes=f"{tiers['cpu'] + budgets.page_bytes}B")
    engine = PagedEngine(
        model,
        units,
        mesh=mesh,
        config=recipe.engine,
        zero=zero,
        dtype=dtype,
        update=AdamW(recipe.optim),
        clip=recipe.train.clip,
        num_exact=recipe.train.warmup_steps,
        open_tiers=TierOpener(
            budgets,
            mesh,
            peers,
            zero=zero,
            run_id=run_id,
            newest_checkpoint=functools.partial(_newest_step, recipe, peers),
            say=say,
            gpu_bytes=tiers.get("gpu", 0),
        ),
    )
    use_adapter(model, recipe.adapter)
    if (grid := recipe.qat.made()) is not None:  # last: the engine takes parameters as they are
        put_on_grid(model, grid, recipe.qat.layers)
    return model, engine


def _zero(recipe: Recipe, plan: Plan, world: int) -> int:
    """The ZeRO stage: the recipe's; or what this run began with on as many ranks, whatever a plan
    says today, because stages sum in another order; or the plan's."""
    if recipe.engine.zero:
        return recipe.engine.zero
    return run_folder.settled(recipe.run_dir, f"zero-{world}", lambda: plan.zero)


def _newest_step(recipe: Recipe, peers: Peers) -> int | None:
    """Of the newest good checkpoint, which is read whole for that."""
    good = newest_good(recipe.run_dir / "checkpoints", peers=peers)
    return None if good is None else good.manifest.step


class Start:
    """The model of train.init_from as this run first read it; later it is another one, if its own
    run has gone on."""

    def __init__(self, recipe: Recipe, peers: Peers) -> None:
        self.recipe, self.peers = recipe, peers

    @functools.cached_property
    def pinned(self) -> Base:
        """First on every rank. Raises CheckpointError."""
        return Base(*on_main(self.peers, self._pin))

    def open(self) -> Opened:
        """First on every rank. Raises CheckpointError."""
        return open_base(self.pinned)

    def _pin(self) -> list[str]:
        word = self.recipe.train.init_from
        assert word is not None
        with as_typed({"folder": "train.init_from", "run": "train.init_from"}):
            return run_folder.settled(
                self.recipe.run_dir, "base", lambda: list(base_of(Path(word)))
            )


def first_weights(
    recipe: Recipe,
    checkpoints: Path,
    engine: Engine,
    peers: Peers,
    start: Start,
    *,
    run_id: str,
    encode: Callable[[str], list[int]],
) -> TrainState:
    """Fill the engine from the newest committed step or good checkpoint, another model, or the
    seed, in that order. Raises CheckpointError, on all ranks alike."""
    restored = engine.restored
    on_main(peers, lambda: run_folder.refuse_to_forget(recipe, run_id))
    good = None
    newest = on_main(peers, lambda: max((s for s, _ in step_folders(checkpoints)), default=-1))
    if restored is None or newest > restored[0]:
        try:
            good = newest_good(checkpoints, peers=peers, repair=True)
        except CheckpointError as error:
            if restored is None:
                raise
            say(f"not used: {error}")
    for folder, reason in good.rejected if good is not None else ():
        say(f"not used: {folder}: {reason}")
    if restored is not None and (good is None or good.manifest.step < restored[0]):
        peers.together(engine.restore)
        state = TrainState.from_json(restored[1]["train"])
        say(f"resuming after step {state.step} from the pages in {recipe.engine.ssd_path}")
    elif good is not None:
        state = TrainState.from_json(load(good, engine.state(), peers=peers)["train"])
        say(f"resuming after step {state.step} from {good.folder}")
    elif recipe.resume is Resume.must:
        rule, remedy = "has nothing to go on from and resume=must", "use resume=auto to start anew"
        raise CheckpointError(line("run.dir", recipe.run_dir, rule, remedy))
    else:
        state = TrainState(run_id=run_id)
        initial = _initial_weights(recipe, start, encode)
        for name, shape in engine.shapes().items():
            engine.fill(name, initial(name, torch.Size(shape)))
    if state.step and recipe.adapter.kind is not AdapterKind.none and not engine.has_frozen:
        initial = _initial_weights(recipe, start, encode)  # frozen weights are in no checkpoint
        shapes = engine.shapes()
        for name, parameter in engine.model.named_parameters():
            if not parameter.requires_grad:
                engine.fill(name, initial(name, torch.Size(shapes[name])))
    last = on_main(peers, lambda: last_logged_step(recipe.run_dir))
    if last > state.step:
        first = state.step + 1
        which = f"step {last} is" if first == last else f"steps {first} to {last} are"
        say(f"{which} trained again: nothing newer is there")
    engine.updates = state.updates
    engine.publish()
    return state


def _initial_weights(
    recipe: Recipe, start: Start, encode: Callable[[str], list[int]]
) -> Callable[[str, torch.Size], Tensor]:
    """Name and shape -> the whole fp32 tensor that a new run starts with; of experts that are held
    as codes, the bytes of their rows."""
    if recipe.train.init_from is None:
        return lambda name, shape: new_weight(recipe.model, name, shape, recipe.train.seed)
    opened = start.open()
    wanted = Transformer(recipe.model, device="meta").state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    check_shapes(opened.weights, shapes, Path(recipe.train.init_from))
    say(f"starting from the weights in {recipe.train.init_from}")
    held = rows_held(recipe.adapter, DTYPES[recipe.train.precision].itemsize)

    def initial(name: str, shape: torch.Size) -> Tensor:
        if held is not None and EXPERTS.fullmatch(name):
            return expert_rows(opened, name, held)
        if name in shapes:
            return opened.weights.read(name).float()
        if name == SOFT_TOKENS:
            vocab_size, seed = recipe.model.vocab_size, recipe.train.seed
            ids = first_ids(recipe.adapter, vocab_size=vocab_size, seed=seed, encode=encode)
            return torch.cat([opened.weights.read(EMBEDDING, i, i + 1).float() for i in ids])
        return new_weight(recipe.model, name, shape, recipe.train.seed)

    return initial


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
        num_soft: int = 0,
    ) -> None:
        """`num_rows` a step over all ranks; of held-out rows, at most as many as there are.
        num_soft: soft tokens before each document, by which rows are longer."""
        rows = Rows(split, seq_len=seq_len, isolate_documents=isolate_documents)
        self.device, self.num_soft = mesh.device, num_soft
        self.loader = Loader(
            rows,
            rows_per_step=min(num_rows, rows.num_rows) if split.name == "held-out" else num_rows,
            rank=mesh.rank,
            world=mesh.world,
            micro_batch_size=micro_batch_size,
            prefetch=prefetch,
        )

    def micro_batches(self, step: int) -> list[Batch]:
        batches = [with_soft(one, self.num_soft) for one in self.loader.micro_batches(step)]
        return [Batch(*(tensor.to(self.device) for tensor in batch)) for batch in batches]

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()


def save(
    recipe: Recipe,
    engine: Engine,
    saver: Saver,
    tokenizer_folder: Path,
    start: Start,
    state: TrainState,
    *,
    is_best: bool,
    block: bool,
) -> None:
    meta: dict[str, Any] = {"train": state.to_json(), "model": model_to_json(recipe.model)}
    if recipe.adapter.kind is not AdapterKind.none:
        base = start.pinned._asdict()
        meta |= {ADAPTER_KEY: adapter_to_json(recipe.adapter), BASE_KEY: base}
    saver.save(
        engine.state(),
        step=state.step,
        meta=meta,
        attachments={"tokenizer": tokenizer_folder},
        expected=_names(engine.model),
        is_best=is_best,
        block=block,
    )


def _names(model: nn.Module) -> set[str]:
    """What a checkpoint must hold, from the model and not from the engine that it checks."""
    kinds = ("model.", "optim.exp_avg.", "optim.exp_avg_sq.")
    parameters = [name for name, p in model.named_parameters() if p.requires_grad]
    buffers = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
    return {kind + name for kind in kinds for name in parameters} | {
        "model." + name for name in buffers
    }


def note_saved(metrics: Metrics, saved: Saved) -> None:
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


def evaluate(model: nn.Module, corpus: Corpus, batches: Batches, mesh: Mesh) -> dict[str, float]:
    """Loss and bits per byte of held-out text."""
    token_bytes = torch.as_tensor(corpus.tokenizer.token_bytes(), device=mesh.device)
    return held_out(model, batches.micro_batches(0), token_bytes=token_bytes, mesh=mesh)
