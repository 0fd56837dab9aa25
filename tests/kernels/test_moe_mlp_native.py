"""The compiled mixture of experts against a sum over all experts in fp64, on every instruction set
here, and as the model and the ranks of an ep axis call it."""

import pytest
import torch

from ptm.common.errors import KernelError
from ptm.kernels import native
from ptm.kernels.moe_mlp import (
    Kept,
    backward_in_place,
    backward_rows,
    forward_in_place,
    forward_rows,
    moe_mlp,
    plan_windows,
)
from ptm.kernels.permute import slots
from tests.support.experts import BOUND, counted, dense, inputs
from tests.support.native import each_isa, error, needs_library, poisoned, same_bits

BF16 = torch.bfloat16
# T, D, F, E, A, experts that get rows
SHAPES = {
    "no tokens": (0, 32, 32, 4, 2, 4),
    "one token": (1, 32, 64, 4, 2, 4),
    "odd numbers": (77, 64, 96, 5, 2, 5),
    "idle experts": (45, 32, 32, 9, 2, 3),
    "all to one": (70, 96, 32, 3, 1, 1),
    "all to all": (33, 32, 64, 3, 3, 3),
    "k in parts": (40, 32, 1056, 2, 2, 2),
    "rows in parts": (1100, 32, 32, 2, 1, 2),
}


def value_and_gradients(x, ids, weights, w1, w2, grad):
    y = moe_mlp(x, ids, weights, counted(ids, len(w1)), w1, w2)
    return [y, *torch.autograd.grad(y, [x, weights, w1, w2], grad)]


@each_isa
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value_and_gradients(isa, shape):
    x, ids, weights, w1, w2, grad = inputs(*shape)
    wide = [t.detach().double().requires_grad_() for t in (x, weights, w1, w2)]
    y = dense(wide[0], ids, *wide[1:])
    expected = [y, *torch.autograd.grad(y, wide, grad.double())]
    with native.forced(isa), poisoned():
        assert native.has("moe_mlp")
        found = value_and_gradients(x, ids, weights, w1, w2, grad)
    for (name, bound), a, b in zip(BOUND.items(), found, expected, strict=True):
        assert error(a, b) <= bound, (name, error(a, b))
    idle = counted(ids, len(w1)) == 0
    assert not found[3][idle].any() and not found[4][idle].any()


@each_isa
def test_the_same_bits_for_any_number_of_threads(isa):
    case = inputs(611, 64, 96, 6, 2, 5)
    with native.forced(isa):
        same_bits(lambda: value_and_gradients(*case))


@each_isa
def test_rows_with_one_expert_and_no_weight(isa):
    """As the ranks of an ep axis call it, with autograd and without."""
    x, ids, _, w1, w2, grad = inputs(90, 32, 64, 4, 1, 3)
    ones, counts = torch.ones(90, 1, dtype=torch.float64), counted(ids, 4)
    wide = [t.detach().double().requires_grad_() for t in (x, w1, w2)]
    y = dense(wide[0], ids, ones, *wide[1:])
    expected = [y, *torch.autograd.grad(y, wide, grad.double())]
    with native.forced(isa), poisoned():
        y = moe_mlp(x, ids, None, counts, w1, w2)
        found = [y, *torch.autograd.grad(y, [x, w1, w2], grad)]
        into = torch.empty_like(w1), torch.empty_like(w2)
        plain = [t.detach() for t in (w1, w2)]
        with torch.no_grad():
            y, kept = forward_rows(x, ids.flatten(), counts, *plain)
            by_x = backward_rows(grad, *plain, Kept(*kept), into=into)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= 6e-3
    assert all(map(torch.equal, found, [y, by_x, *into]))


@each_isa
def test_rows_in_windows_have_the_bits_of_rows_that_were_sent(isa):
    """Two windows of 40 rows, 17 and 33 of them in use; experts 1 and 2 of 4."""
    x, ids, _, w1, w2, grad = inputs(80, 32, 64, 4, 2, 4)
    used = torch.tensor([2 * 17, 2 * 33])
    here = [torch.arange(40 * w, 40 * w + n) for w, n in enumerate((17, 33))]
    rows = torch.cat([(2 * t[:, None] + torch.arange(2)).flatten() for t in here])
    rows = rows[(ids.flatten()[rows] == 1) | (ids.flatten()[rows] == 2)]
    mine, x = ids.flatten()[rows] - 1, x.detach()
    w1, w2 = w1.detach()[1:3].clone(), w2.detach()[1:3].clone()
    grads = torch.stack([grad, grad.flip(0)], 1).view(160, 32)
    with native.forced(isa), poisoned(), torch.no_grad():
        y, kept = forward_rows(x[rows // 2], mine, counted(mine, 2), w1, w2)
        into = torch.empty_like(w1), torch.empty_like(w2)
        by_x = backward_rows(grads[rows], w1, w2, kept, into=into)
        order, starts = plan_windows(ids.reshape(2, 80), used, slice(1, 3), 4)
        to, places = torch.zeros(160, 32, dtype=BF16), (order, starts)
        hidden = forward_in_place(x, w1, w2, *places, to_ND=to, keep=True)
        assert torch.equal(to[rows], y) and to.any(1).sum() == len(rows)
        again, both = (torch.empty_like(w1), torch.empty_like(w2)), grads.clone()
        backward_in_place(x, w1, w2, *places, hidden, rows_ND=both, into=again)
    assert torch.equal(both[rows], by_x) and all(map(torch.equal, into, again))
    others = torch.ones(160, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(both[others], grads[others])


@each_isa
def test_frozen_experts_get_no_gradient_and_nothing_is_kept_without_one(isa):
    x, ids, weights, w1, w2, grad = inputs(50, 32, 32, 4, 2, 4)
    counts = counted(ids, 4)
    with native.forced(isa):
        _, by_x, by_weights, *_ = value_and_gradients(x, ids, weights, w1, w2, grad)
        y = moe_mlp(x, ids, weights, counts, w1.detach(), w2.detach())
        again = torch.autograd.grad(y, [x, weights], grad)
        assert torch.equal(again[0], by_x) and torch.equal(again[1], by_weights)
        with torch.no_grad():
            assert torch.equal(moe_mlp(x, ids, weights, counts, w1, w2), y)


@each_isa
def test_infinities_and_nans_are_not_hidden(isa):
    x, ids, weights, w1, w2, _ = inputs(40, 32, 32, 4, 2, 4)
    for bad in (float("inf"), float("nan")):
        broken = x.detach().clone()
        broken[7, 3] = bad
        with native.forced(isa), torch.no_grad():
            y = moe_mlp(broken, ids, weights, counted(ids, 4), w1, w2)
        finite = y.isfinite().all(1)
        assert not finite[7] and finite.sum() == 39


@needs_library
def test_the_order_is_a_stable_sort():
    ids = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]])
    order, starts = torch.ops.ptm.moe_plan(ids, 5)
    assert order.tolist() == torch.argsort(ids.flatten(), stable=True).tolist()
    assert starts.tolist() == [0, 3, 3, 6, 8, 8]
    place = slots(ids, counted(ids, 5)).flatten()
    assert place[order].tolist() == sorted(place.tolist())
    with pytest.raises(KernelError, match="kernel=moe_plan: shapes it cannot do"):
        torch.ops.ptm.moe_plan(ids, 3)


@needs_library
def test_rows_of_windows_are_sorted_too_and_what_lies_behind_them_is_not_read():
    ids = torch.tensor([[2, 0, 0, 3], [2, 3, 0, 9]])
    used = torch.tensor([4, 3])
    order, starts = plan_windows(ids, used, slice(2, 4), 4)
    assert order.tolist() == [0, 4, 3, 5] and starts.tolist() == [0, 2, 4]
    with pytest.raises(KernelError, match="kernel=moe_plan_windows: shapes it cannot do"):
        plan_windows(ids, used, slice(0, 2), 3)


@needs_library
@pytest.mark.parametrize(("T", "A", "E"), [(0, 2, 4), (1, 1, 1), (33, 2, 5), (4099, 1, 300)])
@pytest.mark.parametrize("used", [1, 9999], ids=["to one", "to all"])
def test_the_order_at_awkward_sizes(T, A, E, used):
    draw = torch.Generator().manual_seed(T)
    ids = torch.randint(max(E - used, 0), E, (T, A), generator=draw)
    order, starts = torch.ops.ptm.moe_plan(ids, E)
    assert torch.equal(order, torch.argsort(ids.flatten(), stable=True))
    ends = torch.bincount(ids.flatten(), minlength=E).cumsum(0)
    assert starts[0] == 0 and torch.equal(starts[1:], ends)


@pytest.mark.parametrize("shape", [(9, 48, 32, 4, 2, 4), (9, 32, 24, 4, 2, 4)], ids=str)
def test_other_sizes_take_the_reference(shape):
    x, ids, weights, w1, w2, grad = inputs(*shape)
    found = value_and_gradients(x, ids, weights, w1, w2, grad)
    with native.forced(None):
        wanted = value_and_gradients(x, ids, weights, w1, w2, grad)
    assert all(map(torch.equal, found, wanted))


@needs_library
def test_the_op_keeps_torchs_rules():
    x, ids, weights, w1, w2, grad = inputs(12, 32, 32, 4, 2, 4)
    order, starts = torch.ops.ptm.moe_plan(ids, 4)
    torch.library.opcheck(torch.ops.ptm.moe_plan.default, (ids, 4))
    for some in (weights, None):
        rows = (order, starts) if some is not None else torch.ops.ptm.moe_plan(ids[:, :1], 4)
        args = (x, some, w1, w2, *rows, True)
        torch.library.opcheck(torch.ops.ptm.moe_mlp.default, args)
    whole = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager")
    y = whole(x, ids, weights, counted(ids, 4), w1, w2)
    found = [y, *torch.autograd.grad(y, [x, weights, w1, w2], grad)]
    wanted = value_and_gradients(x, ids, weights, w1, w2, grad)
    assert all(map(torch.equal, found, wanted))


class Room:
    """A sink that takes what it is told to."""

    def __init__(self, into, adds):
        self.into, self.adds = into, adds

    def room(self):
        return None if self.into is None else (self.into, self.adds)


@each_isa
@pytest.mark.parametrize("shape", ["odd numbers", "idle experts", "k in parts"])
def test_gradients_of_weights_where_a_sink_wants_them(isa, shape):
    """In fp32 unrounded, over what is there or added to it; rounded once where the room is bf16."""
    x, ids, weights, w1, w2, grad = inputs(*SHAPES[shape])
    plain = [t.detach().clone().requires_grad_() for t in (x, weights, w1, w2)]
    first = [torch.full(w.shape, 0.5) for w in (w1, w2)]
    with native.forced(isa), poisoned():
        for param in (w1, w2):
            param.grad_sink = Room(torch.empty(param.shape), False)
        y = value_and_gradients(x, ids, weights, w1, w2, grad)
        exact = [param.grad_sink.into for param in (w1, w2)]
        assert all(g.is_sparse and g._nnz() == 0 for g in y[3:])
        for param, there in zip((w1, w2), first):
            param.grad_sink = Room(there.clone(), True)
        value_and_gradients(x, ids, weights, w1, w2, grad)
        added = [param.grad_sink.into for param in (w1, w2)]
        for param in (w1, w2):
            param.grad_sink = Room(torch.empty(param.shape, dtype=BF16), False)
        value_and_gradients(x, ids, weights, w1, w2, grad)
        rounded = [param.grad_sink.into for param in (w1, w2)]
        ordinary = value_and_gradients(plain[0], ids, *plain[1:], grad)
        for param in (w1, w2):
            param.grad_sink = Room(None, False)
        declined = value_and_gradients(x, ids, weights, w1, w2, grad)
    assert all(map(torch.equal, y[:3], ordinary[:3]))
    assert all(map(torch.equal, declined, ordinary))
    assert all(map(torch.equal, rounded, ordinary[3:]))
    assert all(torch.equal(a.to(BF16), b) for a, b in zip(exact, rounded))
    assert all(torch.equal(a, b + c) for a, b, c in zip(added, first, exact))


@each_isa
def test_a_weight_used_twice_with_a_sink(isa):
    """Both uses are in the room when autograd has accumulated once, recomputed blocks or not."""
    x, ids, weights, w1, w2, grad = inputs(*SHAPES["odd numbers"])
    seen = []

    class Twice(Room):
        def room(self):
            adds, self.adds = self.adds, True
            return self.into, adds

    def run(x):
        return moe_mlp(x, ids, weights.detach(), counted(ids, len(w1)), w1, w2)

    with native.forced(isa):
        y = run(x) + run(2 * x)
        expected = torch.autograd.grad(y, [w1, w2], grad)
        for param in (w1, w2):
            param.grad_sink = Twice(torch.full(param.shape, torch.nan), False)
            param.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad._nnz()))
        y = run(x) + torch.utils.checkpoint.checkpoint(run, 2 * x, use_reentrant=False)
        y.backward(grad)
    assert seen == [0, 0]
    for param, want in zip((w1, w2), expected):
        assert error(param.grad_sink.into, want.double()) <= 5e-3
