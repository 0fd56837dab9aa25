"""Log-probabilities per token against the definition in fp64."""

import pytest
import torch

from ptm.kernels import log_probs
from ptm.kernels.log_probs import linear_log_probs, linear_log_probs_reference


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_the_definition(num_tokens, dtype, monkeypatch):
    monkeypatch.setattr(log_probs, "chunk_tokens", lambda vocab_size: 16)  # several chunks
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 24, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(50, 24, generator=generator, dtype=dtype).mul_(0.3).requires_grad_()
    labels = torch.randint(50, (num_tokens,), generator=generator)
    grad = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = linear_log_probs_reference(*wide, labels, 0.8)
    (expected * grad).sum().backward()
    found = linear_log_probs(x, weight, labels, 0.8)
    (found * grad).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for got, want in zip((x, weight), wide):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=tolerance, atol=tolerance)
