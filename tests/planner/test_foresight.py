"""The step that is written down for a plan: its uses are the engine's, its seconds the plan's."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from ptm.common.errors import RecipeError
from ptm.common.units import GIB, MIB
from ptm.model.config import ModelConfig, Scale
from ptm.planner import states
from ptm.planner.foresight import MOST_ACCESSES, foresee
from ptm.planner.hardware import Hardware
from ptm.planner.job import Job
from ptm.planner.price import plan_of
from ptm.planner.speed import Speed

RATES = dict.fromkeys(("dense", "experts", "attention", "head"), 1e11)
SPEED = Speed(
    flops_per_s={"bf16": RATES},
    memory=1e10,
    link=1e10,
    network=1e9,
    latency=1e-5,
    adam=1e9,
    host=1e10,
    host_adam=1e9,
    ssd_read=1e9,
    ssd_write=5e8,
)
BOX = Hardware(
    name="box", device="cpu", ranks_per_node=8, rank_bytes=8 * GIB, why="", ssd_bytes=GIB,
    speed=SPEED,
)  # fmt: skip
MODEL = ModelConfig(
    scale=Scale.debug,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    attention_projection_size=128,
    moe_intermediate_size=256,
    vocab_size=1024,
)
JOB = Job(
    model=MODEL,
    ranks=2,
    seq_len=128,
    batch_tokens=1024,
    micro_batch_size=2,
    precision="bf16",
    recompute="none",
    has_snapshot=False,
    device="cpu",
    zero=3,
    page_bytes=MIB,
    cpu_bytes=36 * MIB,
    has_ssd=True,
)


def test_pages_move_where_frames_are_few() -> None:
    found = foresee(JOB, BOX)
    plan = plan_of(JOB, BOX)
    frames = next(need.size_bytes for need in plan.needs if need.kind == "pages") // MIB
    assert found.terms.num_frames == frames < states.page_map(JOB).num_pages
    assert len(found.trace.positions) == states.page_map(JOB).num_pages
    assert [name for name, _ in found.trace.kinds] == ["weights", "states", "grads"]
    assert found.terms.commits and found.terms.schedule(found.trace).read_bytes > 0


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_seconds_are_the_plans(zero: int) -> None:
    job = dataclasses.replace(JOB, zero=zero, cpu_bytes=None)
    found, plan = foresee(job, BOX), plan_of(job, BOX)
    work_s = sum(spent.seconds for spent in plan.spent if not spent.is_hidden)
    assert found.trace.step_s == pytest.approx(work_s, rel=1e-6)
    # All pages are in memory; commits alone keep the disk busy for longer than that.
    schedule = found.terms.schedule(found.trace)
    assert schedule.read_bytes == 0
    assert plan.step_s is not None and plan.step_s > work_s
    assert schedule.step_s == pytest.approx(plan.step_s, rel=0.02)


def test_zero_says_how_often_weights_and_sums_are_used() -> None:
    uses = {}
    for zero in (1, 2, 3):
        trace = foresee(dataclasses.replace(JOB, zero=zero), BOX).trace
        kinds = Counter((a.what.partition(" ")[0], trace.kind_of(a.page)) for a in trace.accesses)
        uses[zero] = kinds["forward", "weights"], kinds["backward", "grads"]
    (once, sums), (_, sums_2), (often, sums_3) = uses[1], uses[2], uses[3]
    assert JOB.micro_batches == 2 and sums_2 == sums_3 == 2 * sums
    assert once == uses[2][0] < often


def test_very_many_micro_batches_are_cut_to_some() -> None:
    found = foresee(dataclasses.replace(JOB, batch_tokens=2**24, page_bytes=MIB // 4), BOX)
    assert 2 <= found.num_shown < found.micro_batches == 2**15
    assert found.trace.num_positions <= MOST_ACCESSES


def test_without_speed_there_is_no_schedule() -> None:
    with pytest.raises(RecipeError, match="box: says no speed"):
        foresee(JOB, dataclasses.replace(BOX, speed=None))
