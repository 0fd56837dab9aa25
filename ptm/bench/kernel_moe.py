"""Cases of `ptm bench kernels` for the mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.bench.kernel_case import Case, Run, ours
from ptm.kernels.moe_mlp import moe_mlp as mixture

SHAPES = [  # T, D, F, E, A: the mini model's micro-batch and twice that; wider experts
    (2048, 256, 512, 32, 2),
    (4096, 256, 512, 32, 2),
    (2048, 512, 1024, 32, 2),
]


def moe_mlp() -> Iterator[Case]:
    """bf16, rows spread by chance; forward, then forward and backward."""
    for T, D, hidden, E, A in SHAPES:
        x, grad = _random(T, D), _random(T, D).detach()
        w1, w2 = _random(E, 2 * hidden, D, scale=D**-0.5), _random(E, D, hidden, scale=D**-0.5)
        weights = torch.rand(T, A).requires_grad_()
        ids = torch.rand(T, E).argsort(1)[:, :A]
        counts = torch.bincount(ids.flatten(), minlength=E)
        inputs = [x, weights, w1, w2]
        functions: dict[str, Callable[..., Tensor]] = {
            "ours": lambda x, w, w1, w2, i=ids, c=counts: mixture(x, i, w, c, w1, w2),
            "torch, F.grouped_mm": lambda x, w, w1, w2, i=ids, c=counts: _grouped(
                x, i, w, c, w1, w2
            ),
            "exact": lambda x, w, w1, w2, i=ids, c=counts: _exact(x, i, w, c, w1, w2),
        }
        what = f"{T} x {D}, {E} experts of {hidden}, {A} active, bf16"
        flops, moved = 6.0 * T * A * D * hidden, 2.0 * (w1.numel() + w2.numel() + 2 * x.numel())
        for name, passes in (("forward", 1), ("forward and backward", 3)):
            runs = {n: passed(f, inputs, grad, passes) for n, f in functions.items()}
            torch_name = "torch, F.grouped_mm"
            yield Case(
                "moe_mlp",
                f"{what}, {name}",
                {**ours("moe_mlp", runs["ours"]), torch_name: runs[torch_name]},
                runs["exact"],
                bytes=passes * moved,
                flops=passes * flops,
            )


def passed(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, passes: int) -> Run:
    """A call of `function`; with its backward where `passes` is more than 1."""

    def run() -> Sequence[Tensor]:
        with torch.set_grad_enabled(passes > 1):
            y = function(*inputs)
        return [y, *torch.autograd.grad(y, inputs, grad)] if passes > 1 else [y]

    return run


def _grouped(
    x: Tensor, ids: Tensor, weights: Tensor, counts: Tensor, w1: Tensor, w2: Tensor
) -> Tensor:
    order = ids.flatten().argsort(stable=True)
    ends, token = counts.cumsum(0).to(torch.int32), order // ids.shape[1]
    hidden = F.grouped_mm(x[token], w1.transpose(1, 2), offs=ends)
    gate, up = hidden.chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)
    y = y * weights.flatten()[order].to(y.dtype).unsqueeze(1)
    return torch.zeros_like(x).index_add(0, token, y)


def _exact(
    x: Tensor, ids: Tensor, weights: Tensor, counts: Tensor, w1: Tensor, w2: Tensor
) -> Tensor:
    wide = [t.double() for t in (x, weights, w1, w2)]
    y = torch.zeros_like(wide[0])
    for e in counts.nonzero().flatten().tolist():
        token, place = (ids == e).nonzero(as_tuple=True)
        gate, up = (wide[0][token] @ wide[2][e].t()).chunk(2, dim=-1)
        rows = (F.silu(gate) * up) @ wide[3][e].t()
        y = y.index_add(0, token, rows * wide[1][token, place].unsqueeze(1))
    return y


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape).mul_(scale).bfloat16().requires_grad_()
