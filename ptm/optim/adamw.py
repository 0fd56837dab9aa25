"""AdamW as a function of one flat range: no objects, no state of its own, so an engine may keep the
tensors anywhere.

The arithmetic is torch's fused kernel (238 M parameters a second on one core against 33 to 41
unfused, engine spec). Source: Loshchilov and Hutter, arXiv 1711.05101.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from ptm.kernels.adamw import Stored, adamw_page, serves
from ptm.optim.config import OptimConfig

STATE_BYTES = 8
"""Bytes of moments per parameter (two fp32)."""


@dataclass(frozen=True)
class AdamW:
    """The rule with its settings: called it is `adamw`, on fp32 ranges."""

    config: OptimConfig

    def __call__(self, param: Tensor, **values: Any) -> None:
        adamw(param, config=self.config, **values)

    def sweep(
        self,
        stored: Stored,
        grad: Tensor,
        *,
        scale: float,
        step: int,
        lr: float,
        middle: int,
        last_lr: float | None = None,
    ) -> bool:
        """The same update of a range as pages hold it, in one visit of memory; False, and nothing
        done, where no kernel serves or its bits would be others. Elements from `middle` on have no
        decay."""
        # Elsewhere the rule takes roots that the kernel rounds otherwise (ptm/kernels/adamw.py).
        is_exact = stored.scales is None and last_lr is None
        if not is_exact or not serves(stored, grad):
            return False
        config = self.config
        adamw_page(
            stored,
            grad,
            scale=scale,
            step=step,
            lr=lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            middle=middle,
            last_lr=last_lr,
        )
        return True


def adamw(
    param: Tensor,
    *,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    decay: bool,
    config: OptimConfig,
    last_lr: float | None = None,
) -> None:
    """One update of a flat fp32 range.

    Shapes: all (S,), fp32. Modifies: param, exp_avg, exp_avg_sq. `step` counts from 1 for the first
    update.

    last_lr: for gradients that come one step late, the rate of the step before (0 in the first such
    step). The range then holds not the weights but where they will be if the next update is like
    the last, which is where the next gradient will be used: that of the last update is taken back
    and that of this one is made twice. Source: weight prediction of SpecTrain, arXiv 1809.02839.
    """
    if last_lr is not None and step > 1:
        param.sub_(_change(exp_avg, exp_avg_sq, step - 1, last_lr, config))
    torch_adamw(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.full((), float(step - 1), device=param.device)],
        fused=True,
        amsgrad=False,
        beta1=config.beta1,
        beta2=config.beta2,
        lr=lr,
        weight_decay=config.weight_decay if decay else 0.0,
        eps=config.eps,
        maximize=False,
    )
    if last_lr is not None:
        param.add_(_change(exp_avg, exp_avg_sq, step, lr, config))


def _change(
    exp_avg: Tensor, exp_avg_sq: Tensor, step: int, lr: float, config: OptimConfig
) -> Tensor:
    """What moments after `step` updates add to the weights, without decay."""
    root = exp_avg_sq.sqrt().div_((1 - config.beta2**step) ** 0.5).add_(config.eps)
    return torch.div(exp_avg, root, out=root).mul_(-lr / (1 - config.beta1**step))
