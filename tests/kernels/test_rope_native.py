"""The compiled rotary positions against the definition in fp64, on every instruction set here."""

import pytest
import torch

from ptm.kernels import native
from ptm.kernels.rope import rope_angles, rope_qk, rope_reference
from tests.support.native import each_isa, error, needs_library, poisoned, same_bits

# B, L, H, K, R: empty, one, ragged halves, the published head, an odd number of heads, whole head
SHAPES = [
    (0, 3, 2, 8, 4),
    (1, 1, 1, 4, 4),
    (2, 19, 3, 24, 10),
    (1, 7, 2, 256, 128),
    (3, 5, 5, 6, 6),
]
BOUND = {torch.float32: 1e-7, torch.bfloat16: 2.5e-3}


def rows(*shape, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(dtype).requires_grad_()


def case(shape, dtype, mode="fp32", together=False):
    B, L, H, K, R = shape
    q, k = (rows(B, L, H * K, dtype=dtype, seed=s) for s in (1, 2))
    positions = torch.arange(L)[None] + (0 if together else 7 * torch.arange(B)[:, None])
    return q, k, *rope_angles(positions, rotary_dim=R, base=1e4, mode=mode)


def definition(q, k, cos, sin, num_heads):
    B, L, width = q.shape
    x = torch.cat([q, k], -1).view(B, L, num_heads, 2, width // num_heads)
    return rope_reference(x, cos.double(), sin.double()).unbind(0)


@each_isa
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("mode", ["fp32", "megatron", "hf_bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(isa, shape, mode, dtype):
    q, k, cos, sin = case(shape, dtype, mode)
    H = shape[2]
    grads = [torch.randn(q.shape[0], H, q.shape[1], shape[3]).to(dtype) for _ in range(2)]
    wide = [t.detach().double().requires_grad_() for t in (q, k)]
    expected = list(definition(*wide, cos, sin, H))
    expected += torch.autograd.grad(expected, wide, [g.double() for g in grads])
    inside = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
    with native.forced(isa), poisoned():
        found = list(rope_qk(q, k, cos, sin, num_heads=H))
        first = torch.autograd.grad(found, [q, k], grads, retain_graph=True)
        second = torch.autograd.grad(found, [q, k], inside)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for a, b in zip([*found, *first], expected, strict=True):
        assert a.dtype is dtype and error(a, b) <= BOUND[dtype]


@each_isa
def test_one_row_of_angles_serves_all_batches_and_gaps_are_read(isa):
    q, k, cos, sin = case((3, 6, 2, 8, 4), torch.float32, together=True)
    assert len(cos) == 1
    gaps = torch.cat([q, k], -1)
    with native.forced(isa), poisoned():
        found = rope_qk(gaps[..., :16], gaps[..., 16:], cos, sin, num_heads=2)
    for a, b in zip(found, definition(q.double(), k.double(), cos, sin, 2), strict=True):
        assert error(a, b) <= 1e-7


@each_isa
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_the_same_bits_for_any_number_of_threads(isa, dtype):
    q, k, cos, sin = case((2, 67, 3, 24, 12), dtype)

    def run():
        found = rope_qk(q, k, cos, sin, num_heads=3)
        return [*found, *torch.autograd.grad(found, [q, k], [f.detach() for f in found])]

    with native.forced(isa):
        same_bits(run)


@needs_library
def test_the_op_keeps_torchs_rules():
    inputs = case((2, 3, 2, 8, 4), torch.float32)
    torch.library.opcheck(torch.ops.ptm.rope_qk.default, (*inputs, 2))
    whole = torch.compile(rope_qk, fullgraph=True, backend="aot_eager")
    found = whole(*inputs, num_heads=2)
    torch.testing.assert_close(found, rope_qk(*inputs, num_heads=2))
    torch.autograd.grad(sum(f.sum() for f in found), inputs[:2])
