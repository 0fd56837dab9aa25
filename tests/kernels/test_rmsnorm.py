"""RMSNorm against its definition."""

import pytest
import torch

from ptm.kernels.rmsnorm import rms_norm, rms_norm_reference
from tests.support.compare import assert_same_maths, random


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 3), (2, 3, 64), (5, 257)], ids=str)
def test_agrees_with_the_definition(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    grad = random(*shape, dtype=dtype, seed=2, grad=False)
    assert_same_maths(
        lambda x, w: rms_norm(x, w, 1e-6),
        lambda x, w: rms_norm_reference(x, w, 1e-6),
        [x, weight],
        grad=grad,
    )


def test_reads_rows_that_are_not_contiguous():
    x = random(6, 4, 16, grad=False).transpose(0, 1).requires_grad_()
    weight = random(16)
    y = rms_norm(x, weight, 1e-6)
    y.backward(torch.ones(6, 4, 16).transpose(0, 1))
    torch.testing.assert_close(y, rms_norm_reference(x, weight, 1e-6))


def test_a_row_of_zeros_stays_zero_and_finite():
    x = torch.zeros(1, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), 1e-6).sum().backward()
    assert torch.isfinite(x.grad).all()
