"""The compiled add + RMSNorm against its definition in fp64, on every instruction set here."""

import pytest
import torch

from ptm.common.errors import KernelError
from ptm.kernels import native
from ptm.kernels.rmsnorm import add_rms_norm, rms_norm, rms_norm_reference
from tests.support.native import each_isa, error, needs_library, poisoned, same_bits

SHAPES = [(0, 8), (1, 1), (1, 3), (2, 3, 64), (5, 257), (70, 48), (3000, 33)]
BOUND = {torch.float32: 3e-7, torch.bfloat16: 5e-3}  # bf16: two roundings, each to 2^-9


def rows(*shape, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(dtype).requires_grad_()


def inputs(shape, dtype):
    weight = rows(shape[-1], dtype=dtype, seed=2)
    grads = [rows(*shape, dtype=dtype, seed=s).detach() for s in (3, 4)]
    return rows(*shape, dtype=dtype), rows(*shape, dtype=dtype, seed=1), weight, grads


@each_isa
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_with_a_residual(isa, shape, dtype):
    x, residual, weight, grads = inputs(shape, dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, residual, weight)]
    s = wide[0] + wide[1]
    # Both start from the sum as it is stored; its rounding is not the norm's.
    s = s + (s.to(dtype).double() - s).detach()
    expected = [rms_norm_reference(s, wide[2], 1e-6), s]
    expected += torch.autograd.grad(expected, wide, [g.double() for g in grads])
    with native.forced(isa), poisoned():
        found = list(add_rms_norm(x, residual, weight, 1e-6))
        found += torch.autograd.grad(found, [x, residual, weight], grads)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is dtype and error(a, b) <= BOUND[dtype]


@each_isa
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_without_a_residual_and_from_rows_with_gaps(isa, dtype):
    x = rows(7, 5, 24, dtype=dtype).transpose(0, 1)
    weight = rows(24, dtype=dtype, seed=1)
    expected = rms_norm_reference(x.double(), weight.double(), 1e-6)
    with native.forced(isa), poisoned():
        found = rms_norm(x, weight, 1e-6)
        assert error(found, expected) <= BOUND[dtype]
        grads = torch.autograd.grad(found.sum(), [x, weight])
    want = torch.autograd.grad(expected.sum(), [x, weight])
    for a, b in zip(grads, want, strict=True):
        assert error(a, b) <= 2 * BOUND[dtype]


@each_isa
def test_only_one_of_the_results_is_used(isa):
    x, residual, weight, _ = inputs((6, 40), torch.float32)
    with native.forced(isa):
        y, s = add_rms_norm(x, residual, weight, 1e-6)
        by_s = torch.autograd.grad(s.sum(), [x, residual], retain_graph=True)
        assert all(torch.equal(g, torch.ones_like(x)) for g in by_s)
        by_y = torch.autograd.grad(y.sum(), [x, residual])
    want = torch.autograd.grad(rms_norm_reference(x + residual, weight, 1e-6).sum(), x)[0]
    assert all(error(g, want) <= 1e-6 for g in by_y)


@each_isa
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_the_same_bits_for_any_number_of_threads(isa, dtype):
    x, residual, weight, grads = inputs((901, 64), dtype)

    def run():
        y, s = add_rms_norm(x, residual, weight, 1e-6)
        return [y, s, *torch.autograd.grad([y, s], [x, residual, weight], grads)]

    with native.forced(isa):
        same_bits(run)


@each_isa
def test_infinities_and_nans_are_not_hidden(isa):
    weight = torch.ones(20)
    for bad in (float("inf"), float("nan")):
        x = torch.ones(2, 20, dtype=torch.bfloat16)
        x[1, 17] = bad
        with native.forced(isa):
            y, s = add_rms_norm(x, torch.zeros_like(x), weight.bfloat16(), 1e-6)
        assert y[0].isfinite().all() and y[1].isnan().any()
        assert torch.equal(s.isnan(), x.isnan())


@needs_library
def test_the_op_keeps_torchs_rules():
    x, residual, weight, _ = inputs((3, 16), torch.float32)
    torch.library.opcheck(torch.ops.ptm.add_rmsnorm.default, (x, residual, weight, 1e-6))
    torch.library.opcheck(torch.ops.ptm.add_rmsnorm.default, (x, None, weight, 1e-6))
    whole = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    y, s = whole(x, residual, weight, 1e-6)
    torch.testing.assert_close([y, s], list(add_rms_norm(x, residual, weight, 1e-6)))
    torch.autograd.grad((y + s).sum(), [x, residual, weight])


@needs_library
def test_a_kernel_refuses_memory_with_gaps():
    gaps = torch.ones(4, 6)[:, ::2]
    with pytest.raises(
        KernelError, match="kernel=add_rmsnorm: argument 0 of shape .4, 3.*gaps|contiguous"
    ):
        native.call("add_rmsnorm", gaps)
