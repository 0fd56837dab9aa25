"""The compiled attention against its definition in fp64, on every instruction set here."""

import math

import pytest
import torch

from ptm.kernels import attention, native
from ptm.kernels.attention import attention_reference, causal_attention
from tests.support.native import each_isa, error, poisoned, same_bits

BF16 = torch.bfloat16
# B, H, L, K: one token, a ragged block, several blocks, chunks of queries and their last row
SHAPES = [(1, 1, 1, 32), (2, 3, 33, 32), (1, 2, 160, 256), (2, 1, 513, 64), (1, 1, 1057, 96)]
# The output is rounded once; gradients are made of rounded P or dS, and rounded.
VALUE, GRADIENT = 3e-3, 5e-3


def draw(B, H, L, K, seed=0):
    """q and k as the rotation leaves them, v and the gradient as projections do."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, H, L, K, generator=generator).to(BF16) for _ in range(2))
    v, grad = (
        torch.randn(B, L, H, K, generator=generator).to(BF16).transpose(1, 2) for _ in range(2)
    )
    return [t.requires_grad_() for t in (q, k, v)], grad


def documents(B, L, cuts):
    ids = torch.zeros(B, L, dtype=torch.int64)
    ids[:, cuts] = 1
    ids = ids.cumsum(1)
    return (ids[:, :, None] == ids[:, None, :]).tril()


def masks(B, L):
    """None, whole documents of several lengths, and no rule at all below the diagonal."""
    generator = torch.Generator().manual_seed(L)
    some = torch.rand(B, L, L, generator=generator) < 0.5
    some |= torch.eye(L, dtype=torch.bool)
    cuts = sorted({L // 3, L - 1, min(64, L - 1)})
    return {"causal": None, "documents": documents(1, L, cuts), "random": some.tril()}


def run(inputs, grad, mask):
    out = causal_attention(*inputs, mask)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@each_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "documents", "random"])
def test_value_and_gradients(isa, shape, kind):
    mask = masks(shape[0], shape[2])[kind]
    inputs, grad = draw(*shape)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out = attention_reference(*wide, mask)
    expected = [out, *torch.autograd.grad(out, wide, grad.double())]
    with native.forced(isa), poisoned():
        found = run(inputs, grad, mask)
    assert all(t.isfinite().all() for t in found)
    assert error(found[0], expected[0]) <= VALUE
    for a, b in zip(found[1:], expected[1:], strict=True):
        # A row that sees itself alone has gradients of zero, but for the rounding of its output.
        assert float((a - b).norm()) <= GRADIENT * max(float(b.norm()), float(grad.norm()))
        if shape[2] > 1:
            assert error(a, b) <= GRADIENT


@each_isa
def test_it_is_nearer_to_the_truth_than_the_path_by_torch(isa):
    inputs, grad = draw(1, 2, 300, 64)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out = attention_reference(*wide)
    expected = [out, *torch.autograd.grad(out, wide, grad.double())]
    with native.forced(isa):
        found = run(inputs, grad, None)
    out = attention._BlockedAttention.apply(*inputs, None)
    by_torch = [out, *torch.autograd.grad(out, inputs, grad)]
    for a, b, c in zip(found, by_torch, expected, strict=True):
        assert error(a, c) <= error(b, c)


@each_isa
def test_the_same_bits_for_any_threads_and_company(isa):
    inputs, grad = draw(3, 2, 100, 32)
    mask = documents(3, 100, [40, 41])
    with native.forced(isa):
        same_bits(lambda: run(inputs, grad, mask))
        whole = run(inputs, grad, mask)
        alone = [t.detach()[1:2].requires_grad_() for t in inputs]
        for a, b in zip(run(alone, grad[1:2], mask[1:2]), whole, strict=True):
            assert torch.equal(a, b[1:2])


@each_isa
def test_large_scores_and_numbers_that_are_none(isa):
    inputs, _ = draw(1, 1, 70, 32)
    q, k, v = (t.detach() for t in inputs)
    with native.forced(isa):
        sure = causal_attention(300 * q, 300 * k, v)
        assert (
            error(sure, attention_reference(300.0 * q.double(), 300.0 * k.double(), v.double()))
            < 0.05
        )
        for bad in (math.nan, math.inf):
            broken = q.clone()
            broken[0, 0, 40, 3] = bad
            out = causal_attention(broken, k, v)
            finite = out[0, 0].isfinite().all(1)
            assert not finite[40] and finite.sum() == 69


@each_isa
def test_opcheck_and_compile(isa):
    inputs, grad = draw(2, 2, 40, 32)
    mask = documents(2, 40, [7])
    with native.forced(isa):
        for one in (None, mask):
            torch.library.opcheck(torch.ops.ptm.attention.default, (*inputs, one))
        out, lse = torch.ops.ptm.attention(*inputs, mask)
        given = [t.detach() for t in (*inputs, mask, out, lse)]
        torch.library.opcheck(torch.ops.ptm.attention_backward.default, (grad, *given))
        compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
        plain = run(inputs, grad, mask)
        out = compiled(*inputs, mask)
        for a, b in zip([out, *torch.autograd.grad(out, inputs, grad)], plain, strict=True):
            assert torch.equal(a, b)
