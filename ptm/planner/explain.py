"""From the sections of a recipe to a plan, or to a refusal that says why and what would fit.

    plan_run(recipe.model, recipe.train, recipe.engine, recipe.checkpoint, ranks=env.ranks())

Nothing is allocated: sizes are formulas (ptm/planner/states.py, activations.py), so the plan of
the 40 B model takes the time of the imports. The sections are passed one by one because the
recipe is two floors above.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from ptm.common.env import Ranks, collectives
from ptm.common.errors import PlanError, RecipeError, line
from ptm.common.plan import Plan
from ptm.common.units import format_bytes, parse_bytes
from ptm.engine.config import EngineConfig, MomentsKind
from ptm.model.config import ModelConfig
from ptm.model.lora_config import ALL_WEIGHTS, AdapterConfig
from ptm.planner.hardware import Hardware, detect, load
from ptm.planner.job import Job, rows_held
from ptm.planner.price import plan_of, price
from ptm.planner.probe import with_speed
from ptm.planner.search import Change, changes
from ptm.quant.rows import LEAST_GROUP


class TrainSection(Protocol):
    """What the planner reads of the `train` section, which lives on a floor above."""

    @property
    def seq_len(self) -> int: ...
    @property
    def batch_tokens(self) -> int: ...
    @property
    def micro_batch_size(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def recompute(self) -> str: ...


class CheckpointSection(Protocol):
    """What the planner reads of the `checkpoint` section, a neighbour."""

    @property
    def background(self) -> bool: ...


def plan_run(
    model: ModelConfig,
    train: TrainSection,
    engine: EngineConfig,
    checkpoint: CheckpointSection,
    adapter: AdapterConfig = ALL_WEIGHTS,
    *,
    has_log_probs: bool = False,
    frozen_copy: str = "",
    ranks: Ranks,
    hardware: str | None = None,
    folders: Sequence[Path] = (),
    others: Iterable[tuple[str, ModelConfig, TrainSection]] = (),
    may_measure: bool = False,
) -> Plan:
    """The plan of a run on this machine, or on the described machine `hardware` (a name or file).

    `folders` hold descriptions of machines. `others` are words that choose another size of the
    recipe, with its sections, to be offered if this one does not fit; it is read only then.
    may_measure: take the few seconds that it needs to learn how fast this machine is, where that
    is not known yet.
    Raises PlanError when the run does not fit, RecipeError for a bad description.
    """
    wanted, machine = settle(
        model,
        train,
        engine,
        checkpoint,
        adapter,
        has_log_probs=has_log_probs,
        frozen_copy=frozen_copy,
        ranks=ranks,
        hardware=hardware,
        folders=folders,
        may_measure=may_measure,
    )
    if not price(wanted, machine).memory.fits:
        sizes = (
            (
                words,
                job_of(
                    *(m, t, engine, checkpoint, adapter),
                    has_log_probs=has_log_probs,
                    frozen_copy=frozen_copy,
                    ranks=ranks.world,
                    device=machine.device,
                    ranks_per_node=machine.ranks_per_node,
                ),
            )
            for words, m, t in others
        )
        raise refusal(wanted, machine, others=sizes)
    return plan_of(wanted, machine, is_compared=True)


def settle(
    model: ModelConfig,
    train: TrainSection,
    engine: EngineConfig,
    checkpoint: CheckpointSection,
    adapter: AdapterConfig = ALL_WEIGHTS,
    *,
    has_log_probs: bool = False,
    frozen_copy: str = "",
    ranks: Ranks,
    hardware: str | None = None,
    folders: Sequence[Path] = (),
    may_measure: bool = False,
) -> tuple[Job, Hardware]:
    """The job and the machine of a plan, with the machine's speed where that is known."""
    _check_codes(model, adapter)
    machine = _machine(ranks, hardware, folders, engine)
    wanted = job_of(
        *(model, train, engine, checkpoint, adapter),
        has_log_probs=has_log_probs,
        frozen_copy=frozen_copy,
        ranks=ranks.world,
        device=machine.device,
        ranks_per_node=machine.ranks_per_node,
    )
    if hardware is None:
        machine = with_speed(machine, wanted, may_measure=may_measure, ssd_path=_path(engine))
    return wanted, machine


def _check_codes(model: ModelConfig, adapter: AdapterConfig) -> None:
    """Raise RecipeError where rows of experts cannot be held as codes."""
    if (held := rows_held(adapter, 2)) is None:
        return
    for key in ("hidden_size", "moe_intermediate_size"):
        inputs = getattr(model, key)
        if (group := held.group(inputs)) < LEAST_GROUP:
            rule = (
                f"has groups of {LEAST_GROUP} inputs at least, and model.{key}={inputs} of {group}"
            )
            remedy = f"set that to a multiple of {LEAST_GROUP}, or leave adapter.base out"
            raise RecipeError(line("adapter.base", adapter.base, rule, remedy))


def _machine(
    ranks: Ranks, hardware: str | None, folders: Sequence[Path], engine: EngineConfig
) -> Hardware:
    if hardware is not None:
        return load(hardware, folders=folders)
    return detect(local_ranks=ranks.local_world, ssd_path=_path(engine))


def _path(engine: EngineConfig) -> Path | None:
    return None if engine.ssd_path is None else Path(engine.ssd_path)


def job_of(
    model: ModelConfig,
    train: TrainSection,
    engine: EngineConfig,
    checkpoint: CheckpointSection,
    adapter: AdapterConfig = ALL_WEIGHTS,
    *,
    has_log_probs: bool = False,
    frozen_copy: str = "",
    ranks: int,
    device: str,
    ranks_per_node: int = 1,
) -> Job:
    """What the planner needs of the sections. Raises RecipeError for an ep that divides nothing."""
    if ranks % engine.ep or model.num_experts % engine.ep:
        rule = f"must divide {ranks:,} ranks and {model.num_experts} experts"
        fits = [n for n in range(1, ranks + 1) if ranks % n == model.num_experts % n == 0]
        raise RecipeError(line("engine.ep", engine.ep, rule, f"give one of {fits}"))

    def budget(key: str) -> int | None:
        value = getattr(engine, key)
        return None if value is None else parse_bytes(value, key=f"engine.{key}")

    shares = device == "cpu" and collectives() == "memory"
    return Job(
        model=model,
        ranks=ranks,
        seq_len=train.seq_len,
        batch_tokens=train.batch_tokens,
        micro_batch_size=train.micro_batch_size,
        precision=str(train.precision),
        recompute=str(train.recompute),
        has_snapshot=checkpoint.background,
        device=device,
        zero=engine.zero,
        ep=engine.ep,
        chunks=engine.chunks,
        page_bytes=engine.page_bytes,
        is_int8=engine.moments is MomentsKind.int8,
        update=str(engine.update),
        cpu_bytes=budget("cpu_bytes"),
        gpu_bytes=budget("gpu_bytes"),
        ssd_bytes=budget("ssd_bytes"),
        has_ssd=engine.ssd_path is not None,
        journal_every=engine.journal_every,
        adapter=adapter,
        has_log_probs=has_log_probs,
        shared_ranks=ranks_per_node if shares else 0,
        frozen_copy=frozen_copy,
    )


def refusal(job: Job, hardware: Hardware, *, others: Iterable[tuple[str, Job]] = ()) -> PlanError:
    """The error of a plan that does not fit: one line, the table, and what would fit."""
    plan = plan_of(job, hardware, is_compared=True)
    worst = price(job, hardware).memory.worst
    needed, there = format_bytes(worst.needed_bytes), format_bytes(worst.there_bytes)
    what = {"gpu": "", "cpu": "" if job.device == "cpu" else " in the host's memory"}
    where = what.get(worst.name, f" ({worst.why})")
    first = line(
        "model.scale",
        plan.scale,
        f"needs {needed} per rank{where}, {there} are there",
        "make one of the changes below, each of which fits",
    )
    offers = "\n".join(_offer(change) for change in changes(job, hardware, others))
    return PlanError(f"{first}\n\n{plan.text()}\nwhat would fit\n{offers}")


def _offer(change: Change) -> str:
    plan = change.plan
    needed, there = format_bytes(plan.needed_bytes), format_bytes(plan.there_bytes)
    return f"  {change.words}: {needed} of {there}"
