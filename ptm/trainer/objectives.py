"""What a training mode minimises: a function of (model, batch) that returns a sum over tokens and
their number.

Sums, not means: the engine divides once by the tokens of the whole step, so no micro-batch or rank
weighs more than its tokens (trl#6085, transformers#34191 are what happens otherwise).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
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


class Sums(NamedTuple):
    """A Loss whose total is not the sum of its parts."""

    nll_sum: Tensor
    tokens: Tensor
    aux_sum: Tensor | None
    total: Tensor
    metrics: Mapping[str, Tensor]


def distilled(teacher: nn.Module, part: float) -> Objective:
    """(1 - part) x the usual loss + part x KL(teacher || model), over the tokens that count.

    Logits of one micro-batch are held whole, of both. Source: Hinton et al., arXiv 1503.02531.
    """

    def objective(model: nn.Module, batch: Any) -> Loss:
        where = {"position_ids_BL": batch.position_ids, "document_ids_BL": batch.document_ids}
        kept = batch.loss_mask
        with torch.no_grad():
            wanted = torch.log_softmax(teacher(batch.input_ids, **where)[kept].float(), -1)
        found = torch.log_softmax(model(batch.input_ids, **where)[kept].float(), -1)
        nll_sum = F.nll_loss(found, batch.labels[kept], reduction="sum")
        kl_sum = F.kl_div(found, wanted, reduction="sum", log_target=True)
        total = (1 - part) * nll_sum + part * kl_sum
        return Sums(nll_sum, kept.sum(), None, total, {"kl": kl_sum.detach()})

    return objective


class ReplayBatch(NamedTuple):
    """Rows of pretraining text beside a mode's own; `weight` multiplies their sum."""

    text: Any
    weight: float


REPLAY_METRICS = ("replay_nll", "replay_tokens")


def replaying(objective: Objective) -> Objective:
    """`objective`, and for batches of text a weighted likelihood that counts no tokens: the step is
    still divided by what the mode counts."""

    def loss(model: nn.Module, batch: Any) -> Loss:
        if not isinstance(batch, ReplayBatch):
            return objective(model, batch)
        text = pretrain(model, batch.text)
        sums = (text.nll_sum.detach(), text.tokens)
        return Sums(
            torch.zeros_like(sums[0]),
            torch.zeros_like(text.tokens),
            None,
            text.total * batch.weight,
            dict(zip(REPLAY_METRICS, sums)),
        )

    return loss


OBJECTIVES: dict[ObjectiveKind, Objective] = {
    ObjectiveKind.pretrain: pretrain,
    ObjectiveKind.sft: pretrain,  # batches mask all but the answers
}
