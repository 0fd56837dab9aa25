"""How far two computations of the same thing may lie apart, by number format."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest difference, as a share of the largest expected entry.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 3e-2}


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry; the difference itself if all are zero."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if found.numel() == 0:
        return 0.0
    scale = expected.abs().max().item()
    return (found.double() - expected.double()).abs().max().item() / (scale or 1.0)


def assert_same_maths(found, expected, inputs: list[Tensor], *, grad: Tensor | None = None) -> None:
    """Two functions of `inputs` agree, and so do the gradients of every input that wants one."""
    results = []
    for function in (found, expected):
        copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        y = function(*copies)
        y.backward(torch.ones_like(y) if grad is None else grad.to(y.dtype))
        results.append([y.detach(), *(x.grad for x in copies if x.requires_grad)])
    tolerance = TOLERANCE[inputs[0].dtype]
    for i, (a, b) in enumerate(zip(*results)):
        assert a.dtype == b.dtype
        what = "result" if i == 0 else f"gradient {i}"
        assert distance(a, b) <= tolerance, f"{what} is {distance(a, b):.1e} off"


def random(*shape: int, dtype=torch.float32, seed: int = 0, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
    )
