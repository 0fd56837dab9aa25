"""From the sections of a recipe to a plan, or to a refusal that says why and what would fit.

    plan_run(recipe.model, recipe.train, recipe.engine, recipe.checkpoint, ranks=env.ranks())

Nothing is allocated: sizes are formulas (ptm/planner/cost.py), so the plan of the 40 B model takes
the time of the imports. The sections are passed one by one because the recipe is two floors above.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from ptm.common.env import Ranks
from ptm.common.errors import PlanError, line
from ptm.common.plan import Plan
from ptm.common.units import MIB, format_bytes
from ptm.engine.config import EngineConfig
from ptm.model.config import ModelConfig
from ptm.planner.cost import Job
from ptm.planner.hardware import Hardware, detect, load
from ptm.planner.search import Change, changes, price


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
    *,
    ranks: Ranks,
    hardware: str | None = None,
    folders: Sequence[Path] = (),
    others: Iterable[tuple[str, ModelConfig, TrainSection]] = (),
) -> Plan:
    """The plan of a run on this machine, or on the described machine `hardware` (a name or file).

    `folders` hold descriptions of machines. `others` are words that choose another size of the
    recipe, with its sections, to be offered if this one does not fit; it is read only then.
    Raises PlanError when the run does not fit, RecipeError for a bad description.
    """
    if hardware is None:
        machine = detect(local_ranks=ranks.local_world)
    else:
        machine = load(hardware, folders=folders)

    def job(model: ModelConfig, train: TrainSection) -> Job:
        return Job(
            model=model,
            ranks=ranks.world,
            seq_len=train.seq_len,
            batch_tokens=train.batch_tokens,
            micro_batch_size=train.micro_batch_size,
            precision=str(train.precision),
            recompute=str(train.recompute),
            bucket_bytes=engine.bucket_mib * MIB,
            has_snapshot=checkpoint.background,
            device=machine.device,
        )

    wanted = job(model, train)
    plan = price(wanted, machine)
    if not plan.fits:
        sizes = ((words, job(model, train)) for words, model, train in others)
        raise refusal(wanted, machine, others=sizes)
    return plan


def refusal(job: Job, hardware: Hardware, *, others: Iterable[tuple[str, Job]] = ()) -> PlanError:
    """The error of a plan that does not fit: one line, the table, and what would fit."""
    plan = price(job, hardware)
    needed, there = format_bytes(plan.needed_bytes), format_bytes(plan.there_bytes)
    first = line(
        "model.scale",
        plan.scale,
        f"needs {needed} per rank, {there} are there",
        "make one of the changes below, each of which fits",
    )
    offers = "\n".join(_offer(change) for change in changes(job, hardware, others))
    return PlanError(f"{first}\n\n{plan.text()}\nwhat would fit\n{offers}")


def _offer(change: Change) -> str:
    plan = change.plan
    needed, there = format_bytes(plan.needed_bytes), format_bytes(plan.there_bytes)
    return f"  {change.words}: {needed} of {there}"
