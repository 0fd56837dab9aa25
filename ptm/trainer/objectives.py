"""What a training mode minimises: a function of (model, batch) that returns a sum over tokens and
their number.

Sums, not means: the engine divides once by the tokens of the whole step, so no micro-batch or rank
weighs more than its tokens (trl#6085, transformers#34191 are what happens otherwise).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ptm.trainer.config import ObjectiveKind


class Loss(Protocol):
    """nll_sum: scalar fp32, reported as the loss; tokens: scalar int64, how many it sums over;
    aux_sum: scalar of a loss beside it, summed over the same tokens, None without; total: both,
    with a graph, what the backward starts from. A mode that weighs by something else than tokens
    reports that count as `tokens`. metrics: more scalar sums by name, which the step adds up over
    micro-batches and ranks."""

    @property
    def nll_sum(self) -> Tensor: ...
    @property
    def tokens(self) -> Tensor: ...
    @property
    def aux_sum(self) -> Tensor | None: ...
    @property
    def total(self) -> Tensor: ...
    @property
    def metrics(self) -> Mapping[str, Tensor]: ...


Objective = Callable[[nn.Module, Any], Loss]


def pretrain(model: nn.Module, batch: Any) -> Loss:
    """Negative log-likelihood of every label that the batch does not mask; beside it, the balance
    loss of the experts where model.router_aux_loss_coef asks for one."""
    return model.loss(batch)  # type: ignore[operator]


OBJECTIVES: dict[ObjectiveKind, Objective] = {ObjectiveKind.pretrain: pretrain}
