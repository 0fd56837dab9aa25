"""DeepSpeed behind the seam against plain training on one process, and what it must refuse."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch

from ptm.common.errors import KernelError, RecipeError
from ptm.engine.config import EngineConfig
from ptm.mesh.mesh import Mesh
from ptm.model.transformer import Transformer
from ptm.optim.config import OptimConfig
from ptm.parallel import deepspeed
from ptm.parallel.deepspeed import DeepspeedEngine
from tests.support.engines import (
    fill,
    joined,
    micro_batches,
    reference,
    rows_of_step,
    state_of,
    step_of,
    take,
    tiny,
)
from tests.support.mesh import mesh_of_test
from tests.support.ranks import run_ranks

STEPS = 3


def engine_of(mesh: Mesh, *, clip: float = 1.0, tied: bool = False, **keys: Any) -> DeepspeedEngine:
    os.environ.update(LOCAL_RANK=str(mesh.rank), RANK=str(mesh.rank), WORLD_SIZE=str(mesh.world))
    config = tiny(tie_word_embeddings=tied)
    model = Transformer(config, dtype=keys.pop("dtype", torch.float32))
    model.init_weights(7)
    engine = DeepspeedEngine(
        model, mesh=mesh, config=EngineConfig(**keys), optim=OptimConfig(), clip=clip
    )
    fill(engine, config)
    return engine


def train(rank: int, world: int, micro: int, options: dict[str, Any]) -> dict[str, Any]:
    mesh = mesh_of_test(rank, world)
    engine = engine_of(mesh, **options)
    outcomes = []
    for step in range(STEPS):
        outcomes.append(step_of(engine, micro_batches(step, mesh, micro)))
        with torch.no_grad():  # an evaluation in between
            engine.model.eval().loss(rows_of_step(0))  # type: ignore[operator]
    return {
        "losses": [o.loss for o in outcomes],
        "norms": [o.grad_norm for o in outcomes],
        "flags": outcomes[-1].flags,
        "state": state_of(engine),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "micro", "options"),
    [
        (1, 2, {"zero": 3}),
        (2, 2, {"zero": 1}),
        (2, 2, {"zero": 2}),
        (2, 2, {"zero": 3}),
        (2, 3, {"zero": 3, "tied": True, "clip": 0.5}),
        (2, 3, {"zero": 2, "cpu_bytes": "1GiB"}),
        (2, 2, {"zero": 3, "cpu_bytes": "1GiB"}),
        (3, 2, {"zero": 3}),
        (4, 1, {"zero": 2}),
    ],
    ids=["one", "zero1", "zero2", "zero3", "tied", "zero2-cpu", "zero3-cpu", "three", "empty-rows"],
)
def test_equals_plain_training(world: int, micro: int, options: dict[str, Any]) -> None:
    expected = reference(
        STEPS,
        clip=options.get("clip", 1.0),
        tie_word_embeddings=options.get("tied", False),
    )
    got = run_ranks(world, train, micro, options)
    for rank in got:
        assert rank["losses"] == pytest.approx(expected["losses"], abs=1e-6, rel=1e-6)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert rank["flags"] == [float(world)]
    whole = joined([rank["state"] for rank in got])
    for name, weight in expected["weights"].items():
        found = whole[f"model.{name}"].reshape(weight.shape)
        np.testing.assert_allclose(found, weight, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_trains_on_fp32_masters(zero: int) -> None:
    expected = reference(STEPS)
    got = run_ranks(2, train, 3, {"dtype": torch.bfloat16, "zero": zero})
    assert got[0]["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    assert got[0]["norms"] == pytest.approx(expected["norms"], rel=3e-2)


def answers(model: Any) -> tuple[float, list[Any]]:
    """What dpo and grpo ask of a model beside its loss."""
    batch = rows_of_step(0)
    with torch.no_grad():
        judged = model.eval().log_probs(batch).double().sum().item()
    drawn = [one.ids_B for one in model.steps(batch.input_ids[:2, :4], 5)]
    return judged, torch.stack(drawn).tolist()


def answered(rank: int, world: int, zero: int) -> list[Any]:
    """Before and after a step of a policy that moves nothing."""
    engine = engine_of(mesh_of_test(rank, world), zero=zero)
    found = [answers(engine.model)]
    loss = -engine.model.train().log_probs(take(rows_of_step(0), 0, 2)).sum()  # type: ignore
    one = torch.tensor(1.0)
    engine.backward(loss, is_last=True, tokens=one, lr=0.0)
    norm = engine.step(nll_sum=loss.detach(), tokens=one, lr=0.0, flags=[]).grad_norm
    return [*found, answers(engine.model), norm]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_answers_are_judged_and_drawn_through_shards(zero: int) -> None:
    plain = Transformer(tiny())
    plain.init_weights(0)
    judged, drawn = answers(plain)
    (-plain.train().log_probs(take(rows_of_step(0), 0, 2)).sum()).backward()
    squares = [p.grad.square().sum() for p in plain.parameters() if p.grad is not None]
    for *turns, norm in run_ranks(2, answered, zero):
        assert turns[0] == turns[1] == (pytest.approx(judged, rel=1e-6), drawn)
        assert norm == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-4)


def poisoned(rank: int, world: int, what: float, zero: int) -> tuple[Any, ...]:
    mesh = mesh_of_test(rank, world)
    engine = engine_of(mesh, zero=zero)
    before = state_of(engine)
    outcome = step_of(engine, micro_batches(0, mesh, 3), poison=what if rank == 1 else 0.0)
    same = all(np.array_equal(before[k][2], v[2]) for k, v in state_of(engine).items())
    loss = engine.model.loss(take(rows_of_step(0), 0, 1))  # type: ignore[operator]
    engine.backward(loss.nll_sum, is_last=True)
    bad_loss = engine.step(
        nll_sum=torch.tensor(math.nan), tokens=loss.tokens, lr=1e-3, flags=[]
    ).is_skipped
    after = step_of(engine, micro_batches(1, mesh, 3))
    return outcome.is_skipped, same, bad_loss, engine.updates, after.is_skipped


@pytest.mark.slow
@pytest.mark.parametrize(("what", "zero"), [(math.nan, 2), (math.inf, 3), (math.nan, 1)])
def test_a_non_finite_gradient_or_loss_skips_the_step_on_all(what: float, zero: int) -> None:
    assert run_ranks(2, poisoned, what, zero) == [(True, True, True, 1, False)] * 2


def one_step_more(rank: int, world: int, zero: int, states: Any) -> tuple[Any, ...]:
    mesh = mesh_of_test(rank, world)
    engine = engine_of(mesh, zero=zero)
    if states is None:
        step_of(engine, micro_batches(0, mesh, 3))
        saved = state_of(engine)
        return saved, step_of(engine, micro_batches(1, mesh, 3)).loss
    whole = joined(states)
    for name, rows in engine.state().items():
        rows.write(torch.tensor(whole[name])[rows.first_row : rows.first_row + rows.num_rows])
    engine.updates = 1
    engine.publish()
    return state_of(engine), step_of(engine, micro_batches(1, mesh, 3)).loss


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_state_goes_on_in_another_world(zero: int) -> None:
    first = run_ranks(2, one_step_more, zero, None)
    states = [state for state, _ in first]
    again = run_ranks(3, one_step_more, zero, states)
    whole, restored = joined(states), joined([state for state, _ in again])
    assert all(np.array_equal(whole[name], restored[name]) for name in whole)
    assert again[0][1] == pytest.approx(first[0][1], rel=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {"ep": 2},
        {"gpu_bytes": "1GiB"},
        {"zero": 1, "cpu_bytes": "1GiB"},
        {"zero": 2, "ssd_path": "/x"},
    ],
    ids=["ep", "gpu", "zero1-cpu", "zero2-ssd"],
)
def test_what_deepspeed_has_not_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="engine.kind=paged"):
        deepspeed.refuse(EngineConfig(**keys))


def on_a_disk(rank: int, world: int) -> str:
    try:
        engine_of(mesh_of_test(rank, world), zero=3, ssd_path="/tmp")
    except KernelError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_disk_without_the_op_is_refused_and_nothing_is_compiled() -> None:
    assert "needs its op async_io" in run_ranks(1, on_a_disk)[0]
