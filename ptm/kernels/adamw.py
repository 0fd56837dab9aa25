"""AdamW over a range of a page in one visit (csrc/adamw), for all that pages keep: fp32 masters or
bf16 weights with 16-bit rests, fp32 or int8 moments.

The specification is ptm/optim/adamw.py between `PagedStates.master`, `moments` and their `put_`,
bit for bit with fp32 moments and gradients on time. Elsewhere the rule takes `Tensor.sqrt`, which
MKL does not round correctly (0.6 % of fp32 roots differ from the exact one rounded); the kernel's
are, so with int8 moments and updates a step late a few bytes differ (the test: under 1 in 1000),
and ptm.optim.AdamW leaves them to torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptm.kernels import native

native.declare("adamw_page")


class Stored(NamedTuple):
    """A range as it is in memory, dense; ranges of int8 moments begin at a block of 128.

    Shapes: weight, rest, exp_avg, exp_avg_sq (n,); scales (ceil(n / 128),). `rest` beside bf16
    weights only, `scales` of both int8 moments only.
    """

    weight: Tensor
    rest: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: tuple[Tensor, Tensor] | None = None


def adamw_page(
    stored: Stored,
    grad: Tensor,
    *,
    scale: float,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    middle: int,
    last_lr: float | None = None,
    copy: Tensor | None = None,
    square: Tensor | None = None,
) -> None:
    """Update a range from grad (n,) fp32 or bf16 times `scale`. Modifies: stored, copy, square.

    middle: elements from there on have no decay. last_lr: as ptm.optim.adamw has it. copy (n,) bf16
    gets the new masters. square (1,) fp64 gets the sum of squares of `grad`, which is not finite
    where an element is not. Raises: KernelError where something is not contiguous.
    """
    beta1, beta2 = betas
    weight, rest, exp_avg, exp_avg_sq, scales = stored
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    late = last_lr if step > 1 else None
    native.call(
        "adamw_page", weight, rest, exp_avg, exp_avg_sq, *(scales or (None, None)), grad, copy,
        square, weight.numel(), middle, int(grad.dtype is torch.bfloat16),
        1.0 - lr * weight_decay, float(scale), 1.0 - beta1, float(beta2), 1.0 - beta2, float(eps),
        bias2**0.5, -lr / bias1,
        (1 - beta2 ** (step - 1)) ** 0.5 if late is not None else 1.0,
        -late / (1 - beta1 ** (step - 1)) if late is not None else 0.0,
        -lr / bias1 if last_lr is not None else 0.0,
    )  # fmt: skip


def serves(stored: Stored, grad: Tensor) -> bool:
    """Whether a kernel takes this range: on one device, with masters of one of the two kinds."""
    kind = torch.float32 if stored.rest is None else torch.bfloat16
    device = stored.weight.device
    return (
        stored.weight.dtype is kind
        and all(t.device == device for t in (stored.exp_avg, grad))
        and native.has("adamw_page", device.type)
    )
