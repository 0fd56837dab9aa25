"""One step of the engine on a model that is no transformer, against torch's own AdamW in one
process: same updates for any number of ranks and micro-batches."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from ptm.engine.config import EngineConfig
from ptm.engine.engine import PagedEngine, UnitSpec
from ptm.engine.layout import Named
from ptm.mesh.mesh import Mesh, open_mesh
from ptm.optim.adamw import adamw
from ptm.optim.config import OptimConfig
from tests.support.mesh import mesh_of_test
from tests.support.paged import in_memory
from tests.support.ranks import run_ranks

ROWS, STEPS, LR = 8, 6, 1e-2


def toy() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3), nn.Linear(3, 1, bias=False)
    )
    return model


def rows(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))


def nll(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) ** 2).sum()


def engine_of(model: nn.Module, mesh: Mesh, *, clip: float = 1.0, zero: int = 1) -> PagedEngine:
    """One unit that holds everything, wanted when the first layer runs."""
    values = {name: param.detach().clone() for name, param in model.named_parameters()}
    members = [Named(name, tuple(value.shape), False) for name, value in values.items()]
    engine = PagedEngine(
        model,
        [UnitSpec("root", next(model.children()), members)],
        mesh=mesh,
        config=EngineConfig(page_mib=1),
        zero=zero,
        dtype=torch.float32,
        update=functools.partial(adamw, config=OptimConfig()),
        clip=clip,
        open_tiers=in_memory,
    )
    for name, value in values.items():
        engine.fill(name, value)
    engine.publish()
    return engine


def weights_of(engine: PagedEngine) -> dict[str, torch.Tensor]:
    """Whole weights, as the forward sees them."""
    engine.drain()
    engine.weights.ready(engine.weights.units[0])
    return {name: param.detach().clone() for name, param in engine.model.named_parameters()}


def test_a_parameter_smaller_than_the_world_is_whole() -> None:
    assert sum(run_ranks(3, owned_rows)) == 1


def owned_rows(rank: int, world: int) -> int:
    mesh = mesh_of_test(rank, world)
    engine = engine_of(toy(), mesh)
    return engine.state()["model.3.weight"].num_rows


def backward(engine: PagedEngine, loss: torch.Tensor, *, is_last: bool = True) -> None:
    engine.backward(loss, is_last=is_last, tokens=torch.tensor(ROWS), lr=LR)


def train(rank: int, world: int, micro: int, clip: float, zero: int = 1) -> dict:
    mesh = mesh_of_test(rank, world)
    model = toy()
    engine = engine_of(model, mesh, clip=clip, zero=zero)
    outcomes = []
    for step in range(STEPS):
        mine = rows(step).tensor_split(world)[rank]
        total = torch.zeros(())
        parts = list(mine.split(micro))
        parts += [mine[:0]] * (math.ceil(math.ceil(ROWS / world) / micro) - len(parts))
        for i, part in enumerate(parts, start=1):
            loss = nll(model, part)
            total += loss.detach()
            backward(engine, loss, is_last=i == len(parts))
        outcomes.append(
            engine.step(nll_sum=total, tokens=torch.tensor(len(mine)), lr=LR, flags=[float(rank)])
        )
    ledger = mesh.ledger.entries
    return {
        "weights": {k: p.numpy() for k, p in weights_of(engine).items()},
        "masters": {k: (v.first_row, v.read().numpy()) for k, v in engine.state().items()},
        "norms": [o.grad_norm for o in outcomes],
        "losses": [o.loss for o in outcomes],
        "flags": outcomes[-1].flags,
        "bytes": {k: (e.sent_bytes, e.bound_bytes) for k, e in ledger.items()},
    }


def torch_adamw(clip: float) -> dict:
    model = toy()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    norms, losses = [], []
    for step in range(STEPS):
        loss = nll(model, rows(step)) / ROWS
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return {
        "weights": {k: p.detach().numpy() for k, p in model.named_parameters()},
        "norms": norms,
        "losses": losses,
    }


CASES = [(1, 8, 1), (1, 3, 2), (2, 4, 1), (2, 1, 1), (2, 1, 2), (3, 2, 1), (3, 2, 2), (4, 2, 2)]


@pytest.mark.parametrize("clip", [0.5, 0.0], ids=["clipped", "unclipped"])
@pytest.mark.parametrize(("world", "micro", "zero"), CASES)
def test_equals_torch_adamw(world: int, micro: int, zero: int, clip: float) -> None:
    expected = torch_adamw(clip)
    for got in run_ranks(world, train, micro, clip, zero):
        assert got["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, weight in expected["weights"].items():
            np.testing.assert_allclose(got["weights"][name], weight, rtol=1e-5, atol=1e-6)
            first, rows_of_rank = got["masters"][f"model.{name}"]
            mine = got["weights"][name][first : first + len(rows_of_rank)]
            assert np.array_equal(mine, rows_of_rank)


def test_ranks_hold_the_same_weights_and_hear_the_same_flags() -> None:
    first, *others = run_ranks(3, train, 2, 0.5)
    assert first["flags"] == [3.0]
    for other in others:
        assert other["flags"] == first["flags"] and other["norms"] == first["norms"]
        assert all(np.array_equal(other["weights"][k], v) for k, v in first["weights"].items())


def test_wire_bytes_meet_the_bound() -> None:
    ranks = [rank["bytes"] for rank in run_ranks(2, train, 4, 0.5)]
    numel = sum(p.numel() for p in toy().parameters())
    for name, times in (("scatter_sum", STEPS), ("gather", STEPS + 1)):
        assert sum(rank[name][0] for rank in ranks) == 4 * numel * times
        assert all(rank[name][0] == rank[name][1] for rank in ranks)


def poisoned(rank: int, world: int, bad_rank: int, what: float) -> tuple:
    mesh = mesh_of_test(rank, world)
    model = toy()
    engine = engine_of(model, mesh)
    before = weights_of(engine)
    states = {k: v.read().clone() for k, v in engine.state().items()}
    loss = nll(model, rows(0))
    poison = None
    if rank == bad_rank:
        poison = model[0].weight.register_hook(
            lambda grad: grad.index_put((torch.tensor(0),), torch.tensor(what))
        )
    backward(engine, loss)
    outcome = engine.step(nll_sum=loss.detach(), tokens=torch.tensor(ROWS), lr=LR, flags=[])
    after = weights_of(engine)
    same = all(torch.equal(before[k], after[k]) for k in before) and all(
        torch.equal(states[k], v.read()) for k, v in engine.state().items()
    )
    if poison is not None:
        poison.remove()
    loss = nll(model, rows(1))
    backward(engine, loss)
    later = engine.step(nll_sum=loss.detach(), tokens=torch.tensor(ROWS), lr=LR, flags=[])
    return outcome.is_skipped, outcome.where, same, engine.updates, later.is_skipped


@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(what: float) -> None:
    for is_skipped, where, same, updates, after in run_ranks(2, poisoned, 1, what):
        assert is_skipped and same and updates == 1 and not after
        assert where.startswith("0.weight")


def no_tokens(rank: int, world: int) -> tuple:
    mesh = mesh_of_test(rank, world)
    model = toy()
    engine = engine_of(model, mesh)
    outcome = engine.step(nll_sum=torch.zeros(()), tokens=torch.tensor(0), lr=LR, flags=[])
    return outcome.loss, outcome.grad_norm, outcome.is_skipped


def test_a_step_without_tokens_is_zero_not_nan() -> None:
    assert run_ranks(2, no_tokens) == [(0.0, 0.0, False)] * 2


def test_a_single_process_needs_no_launcher() -> None:
    run_ranks(1, alone, process_group=False)


def alone(rank: int, world: int) -> None:
    mesh = open_mesh(5)
    engine = engine_of(toy(), mesh)
    assert mesh.world == 1 and engine.updates == 0
    mesh.close()
