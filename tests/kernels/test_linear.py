"""Products of bf16 in fp32: results, gradients, and what is kept for the backward."""

import pytest
import torch

from ptm.kernels import attention, linear
from ptm.kernels.attention import attention_reference, causal_attention
from ptm.kernels.linear import FEW_ROWS, Linear


@pytest.fixture(autouse=True)
def widened(monkeypatch):
    """As on a CPU without products of bf16."""
    for module in (linear, attention):
        monkeypatch.setattr(module, "is_widened", lambda x: x.dtype is torch.bfloat16)


@pytest.mark.parametrize("rows", [0, 1, FEW_ROWS - 1, FEW_ROWS, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_fp64_within_one_rounding(rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(48, 40, bias=has_bias, dtype=torch.bfloat16)
    x = torch.randn(1, rows, 48, dtype=torch.bfloat16, requires_grad=True)
    above = torch.randn(1, rows, 40, dtype=torch.bfloat16)
    y = layer(x)
    y.backward(above)
    wanted = x.double() @ layer.weight.double().t()
    wanted = wanted + layer.bias.double() if has_bias else wanted
    torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2)
    assert x.grad is not None and layer.weight.grad is not None
    by_x = above.double() @ layer.weight.double()
    by_weight = above[0].double().t() @ x[0].double()
    torch.testing.assert_close(x.grad.double(), by_x, rtol=5e-3, atol=1e-2)
    torch.testing.assert_close(layer.weight.grad.double(), by_weight, rtol=5e-3, atol=2e-2)


def test_a_frozen_weight_keeps_no_rows() -> None:
    layer = Linear(16, 16, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(20, 16, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert len(kept) == 1 and kept[0].data_ptr() == layer.weight.data_ptr()
    assert x.grad is not None and layer.weight.grad is None


@pytest.mark.parametrize("length", [7, 300])
def test_attention(length: int) -> None:
    torch.manual_seed(0)
    shape = (2, 2, length, 32)
    given = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    above = torch.randn(shape, dtype=torch.bfloat16)
    out, wanted = causal_attention(*given), attention_reference(*exact)
    out.backward(above)
    wanted.backward(above.double())
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=2e-2)
    for mine, reference in zip(given, exact):
        assert mine.grad is not None and reference.grad is not None
        error = (mine.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < 1e-2
