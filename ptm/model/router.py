"""Routers: what picks the experts of a token, and with which weights.

    attention       a tiny attention among the experts scores them (Yuan2.0-M32, arXiv 2405.17976)
    linear          one linear score per expert: the classical router
    shared_expert   DeepSeekMoE's (arXiv 2401.06066): every token visits the last experts, at weight
                    one; a linear router picks the others, weighted by their softmax over all (not
                    renormalised: a single chosen expert would teach the router nothing)

All score in fp32 after a product in the model's type, drop no token, and have no auxiliary loss. A
shared expert is an ordinary expert that is always among the active, so the three have the same
experts and the same work per token, as in the paper's comparison (its table 1), and nothing behind
the router knows of it.

A new router is a class with this protocol and a line in ROUTERS.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptm.kernels.router import Chosen, attention_router, top_experts
from ptm.model.config import ModelConfig, RouterKind


class Routing(NamedTuple):
    """Who goes where. Shapes: ids (T, A) int64, weights (T, A) fp32, counts (E,) int64 with sum T x
    A."""

    ids_TA: Tensor
    weights_TA: Tensor
    counts_E: Tensor


class Router(Protocol):
    """Made with the model's section; called once per layer and forward."""

    def __call__(self, x_TD: Tensor) -> Routing: ...


class AttentionRouter(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_active = config.num_experts_per_tok
        self.query = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.key = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.value = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> Routing:
        chosen = self.choose(x_TD)
        counts_E = _counts(chosen.ids_TA, self.query.out_features)
        return Routing(chosen.ids_TA, chosen.weights_TA, counts_E)

    def choose(self, x_TD: Tensor) -> Chosen:
        """The choice with the scores of all experts."""
        weight = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        query, key, value = _wide(F.linear(x_TD, weight)).chunk(3, dim=-1)
        return attention_router(query, key, value, self.num_active)


class LinearRouter(nn.Linear):
    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.num_active = config.num_experts_per_tok

    def forward(self, x_TD: Tensor) -> Routing:  # type: ignore[override]
        scores_TE = _wide(F.linear(x_TD, self.weight))
        ids_TA = top_experts(scores_TE.detach(), self.num_active)
        weights_TA = scores_TE.gather(1, ids_TA).softmax(-1)
        return Routing(ids_TA, weights_TA, _counts(ids_TA, self.out_features))


class SharedExpertRouter(nn.Linear):
    """Row e of the weight scores expert e; the last experts are shared and have no score."""

    def __init__(self, config: ModelConfig):
        routed = config.num_experts - config.num_shared_experts
        super().__init__(config.hidden_size, routed, bias=False)
        self.num_experts, self.num_shared = config.num_experts, config.num_shared_experts
        self.num_routed = config.num_experts_per_tok - config.num_shared_experts

    def forward(self, x_TD: Tensor) -> Routing:  # type: ignore[override]
        scores_TE = _wide(F.linear(x_TD, self.weight)).softmax(-1)
        ids_TA = top_experts(scores_TE.detach(), self.num_routed)
        weights_TA = scores_TE.gather(1, ids_TA)
        shared_S = torch.arange(self.out_features, self.num_experts, device=x_TD.device)
        ids_TA = torch.cat([ids_TA, shared_S.expand(len(x_TD), -1)], dim=1)
        weights_TA = F.pad(weights_TA, (0, self.num_shared), value=1.0)
        return Routing(ids_TA, weights_TA, _counts(ids_TA, self.num_experts))


ROUTERS: dict[RouterKind, type[nn.Module]] = {
    RouterKind.attention: AttentionRouter,
    RouterKind.linear: LinearRouter,
    RouterKind.shared_expert: SharedExpertRouter,
}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _counts(ids_TA: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(ids_TA.flatten(), minlength=num_experts)
