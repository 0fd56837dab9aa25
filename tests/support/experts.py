"""What tests of moe_mlp share: rows, experts, routes, its definition, and bounds on the error."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# The norm of one rounding to 2^-9 is 2e-3. Gradients of weights see two (dg, du or h, and their
# own), y and the gradient of x a third (a token's rows before they are added up). The router's
# gradient is a sum with cancellation over rounded g and u.
BOUND = {"y": 6e-3, "x": 6e-3, "weights": 4e-2, "w1": 4e-3, "w2": 5e-3}


def draw(*shape, seed, scale=1.0, dtype=torch.bfloat16):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype).requires_grad_()


def inputs(T, D, F_, E, A, used):
    x, grad = draw(T, D, seed=0), draw(T, D, seed=1).detach()
    w1, w2 = draw(E, 2 * F_, D, seed=2, scale=D**-0.5), draw(E, D, F_, seed=3, scale=F_**-0.5)
    weights = draw(T, A, seed=4, dtype=torch.float32)
    scores = torch.rand(T, used, generator=torch.Generator().manual_seed(5))
    return x, scores.argsort(1)[:, :A], weights, w1, w2, grad


def counted(ids, E):
    return torch.bincount(ids.flatten(), minlength=E)


def dense(x, ids, weights, w1, w2):
    """Every token through every expert, and zero weight for those not chosen."""
    gate, up = torch.einsum("td,egd->teg", x, w1).chunk(2, dim=-1)
    y = torch.einsum("tef,edf->ted", F.silu(gate) * up, w2)
    full = torch.zeros(len(x), len(w1), dtype=x.dtype).scatter(1, ids, weights)
    return torch.einsum("te,ted->td", full, y)
