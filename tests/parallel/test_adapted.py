"""Adapters beside frozen weights on the engines that are libraries: what the paged engine does."""

import os
from typing import Any

import numpy as np
import pytest
import torch

from ptm.data.pack import Batch, with_soft
from ptm.engine.config import EngineConfig, EngineKind
from ptm.mesh.mesh import Mesh
from ptm.model.init import new_weight
from ptm.model.lora_config import AdapterConfig, AdapterKind
from ptm.parallel.adapters import adapted_engine
from tests.support.mesh import mesh_of_test
from tests.support.paged import MODEL, OPTIM, ROWS, assemble, batch, make_engine, whole_state
from tests.support.ranks import run_ranks

LORA = AdapterConfig(kind=AdapterKind.lora, targets=("q", "k", "o", "experts", "lfa"), rank=2)
SOFT = AdapterConfig(kind=AdapterKind.prompt, prompt_tokens=4)
STEPS, LR = 4, 1e-2


def micro_batches(step: int, mesh: Mesh, adapter: AdapterConfig) -> list[Batch]:
    per_rank = ROWS // mesh.world
    starts = [mesh.rank * per_rank, mesh.rank * per_rank + per_rank // 2]
    soft = adapter.prompt_tokens if adapter == SOFT else 0
    return [with_soft(batch(step, slice(at, at + per_rank // 2)), soft) for at in starts]


def step_of(engine: Any, batches: list[Batch]) -> Any:
    nll, tokens = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for i, rows in enumerate(batches):
        loss = engine.model.loss(rows)
        nll, tokens = nll + loss.nll_sum.detach(), tokens + loss.tokens
        engine.backward(loss.total, is_last=i == len(batches) - 1, tokens=tokens, lr=LR)
    return engine.step(nll_sum=nll, tokens=tokens, lr=LR, flags=[])


def learn(rank: int, world: int, kind: EngineKind, zero: int, adapter: AdapterConfig):
    """Losses and norms, this rank's rows of the states, and what frozen weights are in use."""
    mesh = mesh_of_test(rank, world)
    engine: Any
    if kind is EngineKind.paged:
        engine = make_engine(mesh, zero=zero, adapter=adapter)
    else:
        os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
        _, engine = adapted_engine(
            MODEL,
            mesh=mesh,
            engine=EngineConfig(kind=kind, zero=zero),
            optim=OPTIM,
            dtype=torch.float32,
            clip=1.0,
            recompute=False,
            adapter=adapter,
        )
        for name, shape in engine.shapes().items():
            engine.fill(name, new_weight(MODEL, name, torch.Size(shape), seed=1))
        engine.publish()
    seen = {}
    gate = engine.model.model.layers[1].mlp.gate

    def look(*_: object) -> None:
        params = gate.named_parameters()
        seen.update({name: p.detach().clone().numpy().tobytes() for name, p in params})

    gate.register_forward_hook(look)
    outcomes = [step_of(engine, micro_batches(step, mesh, adapter)) for step in range(STEPS)]
    first = dict(seen)
    step_of(engine, micro_batches(0, mesh, adapter))
    assert seen == first and len(seen) > 1
    return [(o.loss, o.grad_norm) for o in outcomes], whole_state(engine), seen


@pytest.mark.parametrize(
    "kind, world, zero, adapter",
    [
        (EngineKind.fsdp, 1, 3, LORA),
        (EngineKind.fsdp, 2, 3, LORA),
        (EngineKind.fsdp, 2, 1, SOFT),
        (EngineKind.deepspeed, 2, 3, LORA),
        (EngineKind.deepspeed, 2, 1, LORA),
        (EngineKind.deepspeed, 1, 2, SOFT),
    ],
)
def test_they_learn_what_the_paged_engine_does(
    kind: EngineKind, world: int, zero: int, adapter: AdapterConfig
) -> None:
    wanted = run_ranks(world, learn, EngineKind.paged, zero, adapter)
    found = run_ranks(world, learn, kind, zero, adapter, timeout_s=120)
    np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=2e-6)
    assert min(norm for _, norm in found[0][0]) > 0
    states, expected = assemble([r[1] for r in found]), assemble([r[1] for r in wanted])
    assert states.keys() == expected.keys()
    assert all("lora" in name or "soft" in name for name in states)
    for name, tensor in expected.items():
        atol = 1e-5 * float(tensor.abs().max())
        torch.testing.assert_close(states[name].view_as(tensor), tensor, rtol=1e-3, atol=atol)
    assert all(r[2] == wanted[0][2] for r in found)
