"""The paged engine against plain autograd and torch's AdamW in one process, on any ranks."""

import itertools
import math

import numpy as np
import pytest
import torch

from ptm.engine.layout import Group
from ptm.kernels import moe_mlp
from ptm.parallel import expert
from tests.support.mesh import mesh_of_test
from tests.support.native import needs_library
from tests.support.paged import (
    MODEL,
    assemble,
    backward,
    batch,
    make_engine,
    reference,
    run_steps,
    whole_state,
)
from tests.support.ranks import run_ranks

GRIDS = [(w, e) for w, e in itertools.product([1, 2, 4], [1, 2, 4]) if w % e == 0]


def _gradients(rank: int, world: int, ep: int, zero: int, micro_batches: int):
    mesh = mesh_of_test(rank, world, ep)
    engine = make_engine(mesh, zero=zero)
    backward(engine, mesh, 0, micro_batches)
    found = {}
    states = engine.states
    for group, slot in engine.layout.slots():
        assert isinstance(group, Group)
        start, stop = group.owned(slot)
        rows = torch.empty(stop - start)
        with states.grads() as grads:
            at, end = group.flat(start), group.flat(stop)
            for a, b in states.ranges(at, end, engine.pages.grads):
                rows[a - at : b - at] = grads.field(torch.float32, 0, grads.move(a), b - a)
        first = slot.first_row + (start - slot.start) // slot.row_numel
        trailing = slot.shape[2 if len(slot.shape) == 3 else 1 :]
        num_rows = (stop - start) // slot.row_numel
        found[slot.name] = (first, rows.view(num_rows, *trailing).numpy())
    engine.close()
    return found


@pytest.fixture(scope="module")
def one_process() -> dict[str, torch.Tensor]:
    from ptm.model.init import new_weight
    from ptm.model.transformer import Transformer

    model = Transformer(MODEL)
    for name, param in model.named_parameters():
        param.data.copy_(new_weight(MODEL, name, param.shape, seed=1))
    model.train().loss(batch(0)).nll_sum.backward()
    return {name: param.grad for name, param in model.named_parameters()}  # type: ignore[misc]


@pytest.mark.parametrize("world, ep", GRIDS)
@pytest.mark.parametrize("zero, micro_batches", [(1, 2), (2, 1), (3, 2)])
def test_gradients_are_those_of_one_process(world, ep, zero, micro_batches, one_process):
    found = assemble(run_ranks(world, _gradients, ep, zero, micro_batches))
    for name, wanted in one_process.items():
        error = (found[name].view_as(wanted) - wanted).norm() / wanted.norm().clamp(min=1e-30)
        assert error <= 1e-6, (name, float(error))


def _train(rank: int, world: int, ep: int, zero: int, recompute: bool, micro_batches: int):
    mesh = mesh_of_test(rank, world, ep)
    engine = make_engine(mesh, zero=zero, recompute=recompute)
    outcomes = run_steps(engine, mesh, range(5), micro_batches=micro_batches)
    engine.model.eval()
    with torch.no_grad():
        after = float(engine.model.loss(batch(9)).nll_sum)
    state = whole_state(engine)
    engine.close()
    return [(o.loss, o.grad_norm) for o in outcomes], after, state


CASES = [
    (1, 1, 1, False, 1),
    (1, 1, 3, False, 2),
    (1, 1, 3, True, 1),
    (2, 1, 1, False, 2),
    (2, 2, 3, False, 3),
    (2, 1, 3, True, 2),
    (2, 2, 2, True, 1),
    (4, 2, 3, False, 2),
]


@pytest.mark.parametrize("world, ep, zero, recompute, micro_batches", CASES)
def test_training_is_that_of_torch_in_one_process(world, ep, zero, recompute, micro_batches):
    found = run_ranks(world, _train, ep, zero, recompute, micro_batches)
    outcomes, model = reference(range(5))
    with torch.no_grad():
        after = float(model.eval().loss(batch(9)).nll_sum)
    for rank_outcomes, rank_after, _ in found:
        for (loss, norm), (wanted_loss, wanted_norm) in zip(rank_outcomes, outcomes):
            assert math.isclose(loss, wanted_loss, rel_tol=2e-6)
            assert math.isclose(norm, wanted_norm, rel_tol=1e-5)
        assert math.isclose(rank_after, after, rel_tol=1e-4)
    whole = assemble([state for _, _, state in found])
    for name, param in model.named_parameters():
        # Adam turns the noise of gradients near zero into whole steps, so norms are compared.
        error = (whole["model." + name].view_as(param) - param).norm() / param.norm()
        assert error < 1e-4, (name, float(error))


def _bf16(rank: int, world: int, zero: int):
    mesh = mesh_of_test(rank, world)
    engine = make_engine(mesh, zero=zero, dtype=torch.bfloat16)
    outcomes = run_steps(engine, mesh, range(5), micro_batches=2)
    state = whole_state(engine)
    engine.close()
    return [tuple(o[:3]) for o in outcomes], state


@pytest.mark.parametrize("world", [1, 2])
def test_zero_changes_no_bit_where_the_sums_are_the_same(world):
    """Zero 2 and 3 differ in what is kept, not in any sum; zero 1 sums in another order."""
    two, three = (run_ranks(world, _bf16, zero) for zero in (2, 3))
    for (a, a_state), (b, b_state) in zip(two, three):
        assert a == b
        assert all((a_state[n][1] == b_state[n][1]).all() for n in a_state)


def _sums_of_experts(rank: int, world: int, ep: int, zero: int, with_sinks: bool):
    """Gradient sums of w1 and w2 on this rank after two micro-batches in bf16."""
    if not with_sinks:
        moe_mlp.rooms_of = expert.rooms_of = lambda sinks: None  # type: ignore[assignment]
    mesh = mesh_of_test(rank, world, ep)
    engine = make_engine(mesh, zero=zero, dtype=torch.bfloat16)
    backward(engine, mesh, 0, 2)
    found = []
    for group, slot in engine.layout.slots():
        if "experts" in slot.name:
            start, stop = (group.flat(at) for at in group.owned(slot))
            with engine.states.grads() as grads:
                for a, b in engine.states.ranges(start, stop, engine.pages.grads):
                    found.append(grads.field(torch.float32, 0, grads.move(a), b - a).clone())
    engine.close()
    return torch.cat(found).double().numpy()


@needs_library
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_kernels_put_the_gradients_of_experts_where_they_are_summed(world, ep, zero):
    """The bits of the ordinary path; at zero 1, where sums at home are fp32, without its rounding
    of each micro-batch's."""
    found = run_ranks(world, _sums_of_experts, ep, zero, True)
    ordinary = run_ranks(world, _sums_of_experts, ep, zero, False)
    for mine, theirs in zip(found, ordinary, strict=True):
        if zero == 1 and world > 1:
            assert (mine != theirs).any()
            assert np.linalg.norm(mine - theirs) <= 3e-3 * np.linalg.norm(theirs)
        else:
            assert (mine == theirs).all() and mine.any()
