"""Routers: what picks the experts of a token, and with which weights.

    attention       a tiny attention among the experts scores them (Yuan2.0-M32, arXiv 2405.17976)
    linear          one linear score per expert: the classical router
    shared_expert   DeepSeekMoE's (arXiv 2401.06066): every token visits the last experts, at weight
                    one; a linear router picks the others, weighted by their softmax over all (not
                    renormalised: a single chosen expert would teach the router nothing)

All score in fp32 after a product in the model's type and drop no token. A shared expert is an
ordinary expert that is always among the active, so the three have the same experts and the same
work per token, as in the paper's comparison (its table 1), and nothing behind the router knows of
it.

Two means against uneven loads, both off by default, neither for shared experts:

    balance_loss    added to what is minimised (model.router_aux_loss_coef)
    moved_bias      a bias on what a router ranks (scores; with shared_expert their softmax), for
                    the choice and not for the weights; it follows the loads of whole steps and has
                    no gradient (model.router_bias_update_rate; arXiv 2408.15664)

A new router is a class with this protocol and a line in ROUTERS.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptm.kernels.linear import linear
from ptm.kernels.router import Chosen, attention_router, top_experts
from ptm.model.config import ModelConfig, RouterKind


class Routing(NamedTuple):
    """Who goes where. Shapes: ids (T, A) int64, weights (T, A) fp32, counts (E,) int64 with sum T x
    A; scores (T, routed experts) fp32, before any softmax and bias."""

    ids_TA: Tensor
    weights_TA: Tensor
    counts_E: Tensor
    scores_TE: Tensor


class Router(Protocol):
    """Made with the model's section; called once per layer and forward. bias (E,) fp32 is added to
    what is ranked."""

    def __call__(self, x_TD: Tensor, bias_E: Tensor | None = None) -> Routing: ...


class AttentionRouter(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_active = config.num_experts_per_tok
        self.query = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.key = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.value = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None) -> Routing:
        chosen = self.choose(x_TD, bias_E)
        counts_E = _counts(chosen.ids_TA, self.query.out_features)
        return Routing(chosen.ids_TA, chosen.weights_TA, counts_E, chosen.scores_TE)

    def choose(self, x_TD: Tensor, bias_E: Tensor | None = None) -> Chosen:
        """The choice with the scores of all experts."""
        weight = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        return attention_router(linear(x_TD, weight), self.num_active, bias_E)


class LinearRouter(nn.Linear):
    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.num_active = config.num_experts_per_tok

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None) -> Routing:  # type: ignore[override]
        scores_TE = _wide(linear(x_TD, self.weight))
        ids_TA = top_experts(_ranked(scores_TE, bias_E), self.num_active)
        weights_TA = scores_TE.gather(1, ids_TA).softmax(-1)
        return Routing(ids_TA, weights_TA, _counts(ids_TA, self.out_features), scores_TE)


class SharedExpertRouter(nn.Linear):
    """Row e of the weight scores expert e; the last experts are shared and have no score."""

    def __init__(self, config: ModelConfig):
        routed = config.num_experts - config.num_shared_experts
        super().__init__(config.hidden_size, routed, bias=False)
        self.num_experts, self.num_shared = config.num_experts, config.num_shared_experts
        self.num_routed = config.num_experts_per_tok - config.num_shared_experts

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None) -> Routing:  # type: ignore[override]
        scores_TE = _wide(linear(x_TD, self.weight))
        shares_TE = scores_TE.softmax(-1)
        bias_E = None if bias_E is None else bias_E[: self.out_features]
        ids_TA = top_experts(_ranked(shares_TE, bias_E), self.num_routed)
        weights_TA = shares_TE.gather(1, ids_TA)
        shared_S = torch.arange(self.out_features, self.num_experts, device=x_TD.device)
        ids_TA = torch.cat([ids_TA, shared_S.expand(len(x_TD), -1)], dim=1)
        weights_TA = F.pad(weights_TA, (0, self.num_shared), value=1.0)
        return Routing(ids_TA, weights_TA, _counts(ids_TA, self.num_experts), scores_TE)


ROUTERS: dict[RouterKind, type[nn.Module]] = {
    RouterKind.attention: AttentionRouter,
    RouterKind.linear: LinearRouter,
    RouterKind.shared_expert: SharedExpertRouter,
}


def balance_loss(scores_TE: Tensor, counts_E: Tensor, real_T: Tensor | None) -> Tensor:
    """How unevenly one layer routes the real tokens of one micro-batch, differentiable in the
    scores: A, of routed experts, when even, and up to E.

        E x sum_e f_e P_e,   f_e = rows of e / tokens,   P_e = mean over tokens of softmax(scores)_e

    counts (E,): real rows of the routed experts, without gradient; real (T,) bool, None: all are.
    Source: GShard, arXiv 2006.16668; Switch, arXiv 2101.03961; scaled as Hugging Face's Mixtral,
    where f sums to A, but layer by layer.
    """
    shares_TE = scores_TE.softmax(-1)
    if real_T is None:
        num_tokens = torch.tensor(len(scores_TE), device=scores_TE.device)
    else:
        num_tokens, shares_TE = real_T.sum(), shares_TE * real_T[:, None]
    square = num_tokens.clamp(min=1).to(shares_TE.dtype) ** 2
    return counts_E.numel() * (counts_E * shares_TE.sum(0)).sum() / square


def moved_bias(bias_LE: Tensor, counts_LE: Tensor, rate: float, num_shared: int = 0) -> Tensor:
    """The bias after a step: up by `rate` for experts with fewer rows than the mean of their layer,
    down for those with more; the last `num_shared` have none.

    Shapes: (layers, E) fp32 and int64 rows over all ranks. Only signs of whole numbers count, so
    equal counts give equal bits.
    """
    routed = counts_LE.shape[1] - num_shared
    counts_LE = counts_LE[:, :routed]
    missing_LE = counts_LE.sum(1, keepdim=True) - routed * counts_LE
    moves_LE = F.pad(missing_LE.sign(), (0, num_shared)).to(bias_LE.dtype)
    return bias_LE + rate * moves_LE


def rerouted(routing: Routing, ids_TA: Tensor) -> Routing:
    """The same scores with the experts `ids_TA`, weighed as the router would weigh them: a
    generation's choice, replayed in the update that learns from it. Gradients flow through the
    weights."""
    num_experts, routed = len(routing.counts_E), routing.scores_TE.shape[1]
    if routed == num_experts:
        weights_TA = routing.scores_TE.gather(1, ids_TA).softmax(-1)
    else:  # the shared experts are the last, at weight one
        num_shared = num_experts - routed
        weights_TA = routing.scores_TE.softmax(-1).gather(1, ids_TA[:, :-num_shared])
        weights_TA = F.pad(weights_TA, (0, num_shared), value=1.0)
    return Routing(ids_TA, weights_TA, _counts(ids_TA, num_experts), routing.scores_TE)


def _ranked(scores_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    scores_TE = scores_TE.detach()
    return scores_TE if bias_E is None else scores_TE + bias_E


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _counts(ids_TA: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(ids_TA.flatten(), minlength=num_experts)
