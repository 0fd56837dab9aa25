"""The compiled localized filter against its definition in fp64, on every instruction set here."""

import pytest
import torch

from ptm.common.errors import KernelError
from ptm.kernels import lfa as kernel
from ptm.kernels import native
from ptm.kernels.lfa import lfa
from tests.support.native import each_isa, error, needs_library, poisoned, same_bits

BF16, EPS = torch.bfloat16, 1e-6
NAMES = ("n", "w1", "b1", "w2", "b2", "norm")
# B, L, D: few rows up to 16 in all, ragged blocks, rows and widths in several parts
SHAPES = [(1, 1, 64), (1, 2, 128), (4, 3, 64), (1, 16, 192), (1, 17, 64), (3, 33, 128),
          (1, 640, 64), (2, 300, 256), (1, 50, 640)]  # fmt: skip
# c, s, the unit row and z are rounded once each; so are ds, dc and the gradients.
VALUE, GRADIENT = 4e-3, 5e-3


def draw(B, L, D, seed=0):
    """(n, both convolutions, norm) as leaves, and a gradient of z."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, bound):
        return (2 * torch.rand(*shape, generator=generator) - 1) * bound

    made = [
        torch.randn(B, L, D, generator=generator),
        uniform(D // 2, D, 2, 1, bound=(2 * D) ** -0.5),
        uniform(D // 2, bound=(2 * D) ** -0.5),
        uniform(D, D // 2, 2, 1, bound=D**-0.5),
        uniform(D, bound=D**-0.5),
        1 + uniform(D, bound=0.5),
    ]
    grad = torch.randn(B, L, D, generator=generator).to(BF16)
    return [t.to(BF16).requires_grad_() for t in made], grad


def documents(B, L):
    """None, documents of several lengths, and of one token each."""
    some = torch.rand(B, L, generator=torch.Generator().manual_seed(L)) < 0.8
    return {"one": None, "some": some, "single": torch.zeros(B, L, dtype=torch.bool)}


def filtered(n, w1, b1, w2, b2, norm, connected=None):
    return lfa(n, conv1=(w1, b1), conv2=(w2, b2), norm=norm, eps=EPS, connected_BL=connected)


def run(inputs, grad, connected=None):
    z = filtered(*inputs, connected)
    return [z, *torch.autograd.grad(z, inputs, grad)]


def exact(inputs, grad, connected=None):
    with native.forced(None):
        return run([t.detach().double().requires_grad_() for t in inputs], grad.double(), connected)


@each_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["one", "some", "single"])
def test_value_and_gradients(isa, shape, kind):
    connected = documents(*shape[:2])[kind]
    inputs, grad = draw(*shape)
    expected = exact(inputs, grad, connected)
    with native.forced(isa), poisoned():
        found = run(inputs, grad, connected)
        with torch.no_grad():
            assert torch.equal(filtered(*inputs, connected), found[0])
    assert error(found[0], expected[0]) <= VALUE
    for name, a, b in zip(NAMES, found[1:], expected[1:], strict=True):
        assert error(a, b) <= GRADIENT, name


@each_isa
@pytest.mark.parametrize("shape", [(0, 4, 64), (2, 0, 64)], ids=str)
def test_no_rows(isa, shape):
    inputs, grad = draw(*shape)
    with native.forced(isa), poisoned():
        z, by_n, *by = run(inputs, grad)
    assert z.shape == by_n.shape == shape
    assert all(not g.any() for g in by)


@each_isa
def test_it_is_as_near_to_the_truth_as_the_path_by_torch(isa):
    inputs, grad = draw(2, 150, 128)
    connected = documents(2, 150)["some"]
    expected = exact(inputs, grad, connected)
    with native.forced(isa):
        found = run(inputs, grad, connected)
    with native.forced(None):
        by_torch = run(inputs, grad, connected)
    for i in (0, 1, 2, 4):  # biases and norm have too few elements to tell
        assert error(found[i], expected[i]) <= 1.01 * error(by_torch[i], expected[i])


@each_isa
@pytest.mark.parametrize("shape", [(2, 5, 64), (2, 300, 128)], ids=str)
def test_the_same_bits_for_any_threads_and_strides(isa, shape):
    inputs, grad = draw(*shape)
    connected = documents(*shape[:2])["some"]
    with native.forced(isa):
        same_bits(lambda: run(inputs, grad, connected))
        dense = run(inputs, grad, connected)
        turned = inputs[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        wide = grad.repeat(1, 1, 2)[..., : grad.shape[2]]
        assert not turned.is_contiguous() and not wide.is_contiguous()
        for a, b in zip(run([turned, *inputs[1:]], wide, connected), dense, strict=True):
            assert torch.equal(a, b)


@each_isa
@pytest.mark.parametrize("length", [12, 70])
def test_documents_know_nothing_of_each_other(isa, length):
    """The first column is ignored, and what is no number stays in its document, two rows long."""
    (n, *weights), _ = draw(2, length, 64)
    connected = torch.ones(2, length, dtype=torch.bool)
    connected[:, 6] = False
    broken = n.detach().clone()
    broken[0, 5, 3] = torch.nan
    broken[1, 7, 3] = torch.nan
    with native.forced(isa), torch.no_grad():
        finite = filtered(broken, *weights, connected).isfinite().all(-1)
        plain, found = filtered(n, *weights, connected), filtered(broken, *weights, connected)
    assert (~finite).nonzero().tolist() == [[0, 5], [1, 7], [1, 8], [1, 9]]
    assert torch.equal(found[finite], plain[finite])


@each_isa
@pytest.mark.parametrize("shape", [(1, 3, 64), (2, 40, 128)], ids=str)
def test_frozen_weights(isa, shape):
    inputs, grad = draw(*shape)
    with native.forced(isa):
        expected = run(inputs, grad)
        n, *weights = inputs
        z = filtered(n, *(w.detach() for w in weights))
        assert torch.equal(z, expected[0])
        assert torch.equal(torch.autograd.grad(z, n, grad)[0], expected[1])


@needs_library
@pytest.mark.parametrize("D, dtype", [(96, BF16), (32, BF16), (64, torch.float32)], ids=str)
def test_other_sizes_and_types_take_the_reference(D, dtype):
    inputs, grad = draw(2, 9, D)
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    assert not kernel._serves(*inputs)
    for a, b in zip(run(inputs, grad.to(dtype)), exact(inputs, grad), strict=True):
        assert error(a, b) <= (GRADIENT if dtype is BF16 else 1e-6)


@needs_library
def test_the_kernel_refuses_what_is_not_dense():
    (n, w1, *_), _ = draw(1, 4, 64)
    with pytest.raises(KernelError, match="kernel=lfa: argument 1 .* is not contiguous"):
        native.call("lfa", n, w1.transpose(0, 1))


@each_isa
def test_opcheck_and_compile(isa):
    inputs, grad = draw(2, 20, 64)
    connected = documents(2, 20)["some"]
    with native.forced(isa):
        for one in (None, connected):
            torch.library.opcheck(torch.ops.ptm.lfa.default, (*inputs, one, EPS, True))
        _, c, s, rstd = torch.ops.ptm.lfa(*inputs, connected, EPS, True)
        n, w1, _, w2, _, norm = (t.detach() for t in inputs)
        given = [grad, n, w1, w2, norm, connected, c.detach(), s.detach(), rstd.detach()]
        for by_weights in (True, False):
            torch.library.opcheck(torch.ops.ptm.lfa_backward.default, (*given, by_weights))
        plain = run(inputs, grad, connected)
        z = torch.compile(filtered, fullgraph=True, backend="aot_eager")(*inputs, connected)
        for a, b in zip([z, *torch.autograd.grad(z, inputs, grad)], plain, strict=True):
            assert torch.equal(a, b)


class Room:
    """A sink that takes what it is told to."""

    def __init__(self, into, adds):
        self.into, self.adds = into, adds

    def room(self):
        return None if self.into is None else (self.into, self.adds)


@each_isa
@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 600, 128)], ids=str)
def test_gradients_of_weights_where_a_sink_wants_them(isa, shape):
    """In fp32 unrounded, over what is there or added to it; rounded once where the room is bf16."""
    inputs, grad = draw(*shape)
    weights = inputs[1], inputs[3]

    def put(rooms, adds=False):
        for weight, room in zip(weights, rooms):
            weight.grad_sink = Room(room, adds)
        return run(inputs, grad)

    with native.forced(isa), poisoned():
        ordinary = run(inputs, grad)
        exact = [torch.empty(w.shape) for w in weights]
        found = put(exact)
        first = [torch.full(w.shape, 0.5) for w in weights]
        added = [t.clone() for t in first]
        put(added, adds=True)
        rounded = [torch.empty_like(w, requires_grad=False) for w in weights]
        put(rounded)
        declined = put([None, None])
    assert all(found[i].is_sparse and found[i]._nnz() == 0 for i in (2, 4))
    assert all(torch.equal(found[i], ordinary[i]) for i in (0, 1, 3, 5, 6))
    assert all(map(torch.equal, declined, ordinary))
    assert all(map(torch.equal, rounded, [ordinary[2], ordinary[4]]))
    assert all(torch.equal(a.to(BF16), b) for a, b in zip(exact, rounded))
    assert all(torch.equal(a, b + c) for a, b, c in zip(added, first, exact))


@each_isa
def test_recomputed_blocks_with_a_sink(isa):
    """Both uses of the weights are in the room when autograd has accumulated."""
    inputs, grad = draw(1, 40, 64)
    n, *rest = inputs
    with native.forced(isa):
        z = filtered(n, *rest) + filtered(2 * n, *rest)
        expected = torch.autograd.grad(z, [rest[0], rest[2]], grad)

        class Twice(Room):
            def room(self):
                adds, self.adds = self.adds, True
                return self.into, adds

        for weight in (rest[0], rest[2]):
            weight.grad_sink = Twice(torch.full(weight.shape, torch.nan), False)
        again = torch.utils.checkpoint.checkpoint(filtered, 2 * n, *rest, use_reentrant=False)
        (filtered(n, *rest) + again).backward(grad)
    for weight, want in zip((rest[0], rest[2]), expected):
        assert weight.grad.is_sparse and weight.grad._nnz() == 0
        assert error(weight.grad_sink.into, want.double()) <= GRADIENT
