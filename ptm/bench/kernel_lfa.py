"""Cases of `ptm bench kernels` for the localized filter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.bench.kernel_case import Case, ours
from ptm.bench.kernel_moe import passed
from ptm.kernels.lfa import lfa
from ptm.kernels.rmsnorm import rms_norm_reference

SHAPES = [  # B, L, D: the mini model's micro-batch, twice its width, the published width
    (4, 512, 256),
    (2, 1024, 512),
    (1, 1024, 2048),
]
STEPS = [(1, 3, 256), (1, 3, 2048)]  # a decoded token behind its two predecessors
EPS = 1e-6


def lfa_cases() -> Iterator[Case]:
    """One document a row, bf16. The work is that of four matrices of D/2 x D forward, of eight more
    backward. "conv2d": as published, with a transposition to channels first and back."""
    functions: dict[str, Callable[..., Tensor]] = {
        "ours": _filtered,
        "torch, conv2d": _by_conv2d,
        "exact": lambda *t: _by_conv2d(*(x.double() for x in t)),
    }
    for B, L, D in SHAPES + STEPS:
        inputs = [t.bfloat16().requires_grad_() for t in _draw(B, L, D)]
        grad = torch.randn(B, L, D).bfloat16()
        product, rows = 4.0 * B * L * D * D, 2.0 * B * L * D
        both = ("forward", 1), ("forward and backward", 3)
        for name, passes in both if (B, L, D) in SHAPES else both[:1]:
            runs = {n: passed(f, inputs, grad, passes) for n, f in functions.items()}
            yield Case(
                "lfa",
                f"{B} x {L} x {D}, bf16, {name}",
                {**ours("lfa", runs["ours"]), "torch, conv2d": runs["torch, conv2d"]},
                runs["exact"],
                bytes=passes * (2 * rows + 4.0 * D * D),
                flops=passes * product,
            )


def _filtered(n: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm: Tensor) -> Tensor:
    return lfa(n, conv1=(w1, b1), conv2=(w2, b2), norm=norm, eps=EPS)


def _by_conv2d(n: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm: Tensor) -> Tensor:
    image = n.transpose(1, 2)[..., None]
    for weight, bias in ((w1, b1), (w2, b2)):
        image = F.conv2d(F.pad(image, (0, 0, 1, 0)), weight, bias)
    return rms_norm_reference(image[..., 0].transpose(1, 2) + n, norm, EPS)


def _draw(B: int, L: int, D: int) -> list[Tensor]:
    """Rows and weights as the model begins with."""

    def uniform(*shape: int, fan_in: int) -> Tensor:
        return (2 * torch.rand(shape) - 1) * fan_in**-0.5

    conv1 = uniform(D // 2, D, 2, 1, fan_in=2 * D), uniform(D // 2, fan_in=2 * D)
    conv2 = uniform(D, D // 2, 2, 1, fan_in=D), uniform(D, fan_in=D)
    return [torch.randn(B, L, D), *conv1, *conv2, 0.5 + torch.rand(D)]
