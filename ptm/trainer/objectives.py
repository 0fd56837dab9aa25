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

from ptm.model.generate import recorded_routes
from ptm.trainer import policy
from ptm.trainer.config import ObjectiveKind
from ptm.trainer.policy_config import DpoConfig, GrpoConfig


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


class PairBatch(NamedTuple):
    """Chosen and rejected answers in turn, with their log-probabilities under the reference."""

    batch: Any
    reference_RL: Tensor


PREFERENCE_METRICS: tuple[str, ...] = ("accuracy", "margin", "kl")


def preferring(config: DpoConfig) -> Objective:
    """DPO; counts pairs."""

    def loss(model: Any, pairs: PairBatch) -> Loss:
        found = policy.dpo(
            model.log_probs(pairs.batch),
            pairs.reference_RL,
            pairs.batch.loss_mask,
            beta=config.beta,
            length_normalised=config.length_normalised,
        )
        right = (found.margins_P > 0).sum()
        sums = (right, found.margins_P.detach().sum(), found.kl_P.detach().sum())
        total = found.losses_P.sum()
        count = torch.tensor(len(found.losses_P), device=total.device)
        metrics = dict(zip(PREFERENCE_METRICS, sums))
        return Sums(total.detach(), count, None, total, metrics)

    return loss


class GrpoBatch(NamedTuple):
    """Whole groups of answers: rows, log-probabilities when drawn and under the reference,
    advantages, the experts each token was sent to, and sums for the log."""

    batch: Any
    rollout_BL: Tensor
    advantages_B: Tensor
    reference_BL: Tensor | None
    routes_BLNA: Tensor
    metrics: Mapping[str, Tensor]


ROLLOUT_METRICS: tuple[str, ...] = (
    *("reward", "rows", "groups", "equal_groups", "unended", "reward_raised", "reward_hung"),
    *("kl", "clipped", "log_ratio", "flipped", "routed"),
)


def rewarded(config: GrpoConfig) -> Objective:
    """GRPO; counts tokens of answers."""

    def loss(model: Any, rollout: GrpoBatch) -> Loss:
        batch = rollout.batch
        mask_BL = batch.loss_mask
        with recorded_routes(model) as chosen:
            log_probs_BL = model.log_probs(
                batch,
                temperature=config.temperature,
                routes_BLNA=rollout.routes_BLNA if config.replay_routes else None,
            )
        found = policy.grpo(
            log_probs_BL,
            rollout.rollout_BL,
            rollout.advantages_B,
            mask_BL,
            clip=config.clip,
            kl_coef=config.kl_coef,
            reference_BL=rollout.reference_BL,
        )
        own_BLNA = torch.stack([ids[0].view(*mask_BL.shape, -1) for ids in chosen], dim=2)
        differ = own_BLNA.sort(-1).values != rollout.routes_BLNA.sort(-1).values
        real = batch.document_ids >= 0
        log_ratios = (log_probs_BL.detach() - rollout.rollout_BL).abs() * mask_BL
        metrics = {
            **rollout.metrics,
            "kl": found.kl_BL.detach().sum(),
            "clipped": found.clipped_BL.sum(),
            "log_ratio": log_ratios.sum(),
            "flipped": differ.any(-1)[real].sum(),
            "routed": real.sum() * len(chosen),
        }
        total = found.losses_BL.sum()
        return Sums(total.detach(), mask_BL.sum(), None, total, metrics)

    return loss


def per_rollout(sums: Mapping[str, float], tokens: int) -> Mapping[str, float]:
    """A step's rollouts: reward and share of unended answers by answer, equal groups by group,
    flipped routes by token and layer, failures of the reward as counts, the rest by token."""
    rows, groups = max(sums["rows"], 1.0), max(sums["groups"], 1.0)
    return {
        "reward": sums["reward"] / rows,
        "unended": sums["unended"] / rows,
        "equal_groups": sums["equal_groups"] / groups,
        "reward_raised": sums["reward_raised"],
        "reward_hung": sums["reward_hung"],
        "flipped_routes": sums["flipped"] / max(sums["routed"], 1.0),
        "answer_tokens": tokens / rows,
        **{name: sums[name] / max(tokens, 1) for name in ("kl", "clipped", "log_ratio")},
    }


OBJECTIVES: dict[ObjectiveKind, Objective] = {
    ObjectiveKind.pretrain: pretrain,
    ObjectiveKind.sft: pretrain,  # batches mask all but the answers
}
