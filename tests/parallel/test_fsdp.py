"""FSDP2 behind the seam against plain training on one process: same losses, norms and weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ptm.common.errors import KernelError, RecipeError
from ptm.engine.config import EngineConfig
from ptm.mesh.mesh import Mesh
from ptm.model.transformer import Transformer
from ptm.parallel import fsdp
from ptm.parallel.fsdp import FsdpEngine
from ptm.parallel.recompute import recompute_blocks
from tests.support.engines import (
    UPDATE,
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


def engine_of(
    mesh: Mesh,
    *,
    zero: int = 3,
    device: str = "meta",
    dtype: torch.dtype = torch.float32,
    clip: float = 1.0,
    is_stock: bool = False,
    recompute: bool = False,
    **changes: Any,
) -> FsdpEngine:
    config = tiny(**changes)
    model = Transformer(config, dtype=dtype, device=device)
    if recompute:
        recompute_blocks(model.model.layers)
    engine = FsdpEngine(
        model,
        units=model.model.layers,
        mesh=mesh,
        config=EngineConfig(zero=zero),
        update=UPDATE,
        clip=clip,
        is_stock=is_stock,
    )
    fill(engine, config)
    return engine


def train(rank: int, world: int, micro: int, options: dict[str, Any]) -> dict[str, Any]:
    mesh = mesh_of_test(rank, world)
    engine = engine_of(mesh, **options)
    outcomes, counts = [], 0
    for step in range(STEPS):
        outcomes.append(step_of(engine, micro_batches(step, mesh, micro)))
        counts += int(engine.model.take_expert_counts().sum())  # type: ignore[operator]
        with torch.no_grad():  # an evaluation in between
            engine.model.eval().loss(rows_of_step(0))  # type: ignore[operator]
    ledger = mesh.ledger.entries
    return {
        "losses": [o.loss for o in outcomes],
        "norms": [o.grad_norm for o in outcomes],
        "flags": outcomes[-1].flags,
        "counts": counts,
        "state": state_of(engine),
        "bytes": {k: (e.calls, e.sent_bytes, e.bound_bytes) for k, e in ledger.items()},
    }


@pytest.mark.parametrize(
    ("world", "micro", "options"),
    [
        (1, 6, {}),
        (1, 2, {"zero": 1, "recompute": True}),
        (2, 2, {}),
        (2, 1, {"zero": 2, "device": "cpu"}),
        (2, 2, {"zero": 1, "is_stock": True}),
        (2, 2, {"tie_word_embeddings": True, "recompute": True, "clip": 0.5}),
        (4, 1, {}),
    ],
    ids=["one", "one-zero1", "two", "two-zero2", "two-zero1-stock", "two-tied", "four-empty-rows"],
)
def test_equals_plain_training(world: int, micro: int, options: dict[str, Any]) -> None:
    tied = {k: v for k, v in options.items() if k in ("tie_word_embeddings", "clip")}
    expected = reference(STEPS, **tied)
    got = run_ranks(world, train, micro, options)
    for rank in got:
        assert rank["losses"] == pytest.approx(expected["losses"], abs=1e-6, rel=1e-6)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert rank["flags"] == [float(world)]
    whole = joined([rank["state"] for rank in got])
    for name, weight in expected["weights"].items():
        found = whole[f"model.{name}"].reshape(weight.shape)
        np.testing.assert_allclose(found, weight, rtol=1e-4, atol=2e-5, err_msg=name)
    # 6 rows of 24 tokens, 2 experts each, 2 layers
    assert sum(rank["counts"] for rank in got) == STEPS * 6 * 24 * 2 * 2


def test_bf16_keeps_fp32_masters_and_meets_the_byte_bound() -> None:
    expected = reference(STEPS)
    got = run_ranks(2, train, 3, {"dtype": torch.bfloat16})
    assert got[0]["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    assert got[0]["losses"] == got[1]["losses"]
    for calls, sent, bound in (got[0]["bytes"][kind] for kind in ("gather", "scatter_sum")):
        assert calls and sent == bound
    masters = [v for k, v in joined([r["state"] for r in got]).items() if k.startswith("model.")]
    assert any((torch.tensor(m).bfloat16().float() != torch.tensor(m)).any() for m in masters)


def poisoned(rank: int, world: int, what: float) -> tuple[Any, ...]:
    mesh = mesh_of_test(rank, world)
    engine = engine_of(mesh)
    before = state_of(engine)
    outcome = step_of(engine, micro_batches(0, mesh, 3), poison=what if rank == 1 else 0.0)
    same = all(np.array_equal(before[k][2], v[2]) for k, v in state_of(engine).items())
    after = step_of(engine, micro_batches(1, mesh, 3))
    return outcome.is_skipped, outcome.where, same, engine.updates, after.is_skipped


@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(what: float) -> None:
    for is_skipped, where, same, updates, after in run_ranks(2, poisoned, what):
        assert is_skipped and same and updates == 1 and not after
        assert where.startswith("model.embed_tokens.weight")


def one_step_more(rank: int, world: int, states: list[dict[str, Any]] | None) -> tuple[Any, ...]:
    mesh = mesh_of_test(rank, world)
    engine = engine_of(mesh)
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


def test_state_goes_on_in_another_world() -> None:
    first = run_ranks(2, one_step_more, None)
    states = [state for state, _ in first]
    again = run_ranks(3, one_step_more, states)
    whole, restored = joined(states), joined([state for state, _ in again])
    assert all(np.array_equal(whole[name], restored[name]) for name in whole)
    assert again[0][1] == pytest.approx(first[0][1], rel=1e-6)


def no_tokens(rank: int, world: int) -> tuple[Any, ...]:
    mesh = mesh_of_test(rank, world)
    outcome = step_of(engine_of(mesh), [take(rows_of_step(0), 0, 0)])
    return outcome.loss, outcome.grad_norm, outcome.is_skipped


def test_a_step_without_rows_is_zero_and_does_not_hang() -> None:
    assert run_ranks(2, no_tokens) == [(0.0, 0.0, False)] * 2


@pytest.mark.parametrize(
    "changes", [{"ep": 2}, {"cpu_bytes": "1GiB"}, {"ssd_path": "/x"}], ids=["ep", "cpu", "ssd"]
)
def test_what_only_the_paged_engine_has_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="engine.kind=paged"):
        fsdp.refuse(EngineConfig(**changes))


def test_a_torch_without_the_hooks_is_refused() -> None:
    with pytest.raises(KernelError, match="set_custom_all_gather.*torch 2.11"):
        fsdp.check_names(torch.nn.Linear(1, 1))
