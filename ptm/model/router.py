"""Routers: what picks the experts of a token, and with which weights.

    attention       a tiny attention among the experts scores them (Yuan2.0-M32, arXiv 2405.17976)
    linear          one linear score per expert: the classical router
    shared_expert   Qwen1.5-MoE's: every token visits the last expert, weighted by the sigmoid of
                    its own gate; a linear router picks the others, weighted by their softmax over
                    all (not renormalised: a single chosen expert would teach the router nothing)

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
    """Row e of the weight scores expert e; the last row is the shared expert's own gate."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.num_active = config.num_experts_per_tok

    def forward(self, x_TD: Tensor) -> Routing:  # type: ignore[override]
        shared = self.out_features - 1
        scores_TE = _wide(F.linear(x_TD, self.weight))
        weights_TE = torch.cat(
            [scores_TE[:, :shared].softmax(-1), scores_TE[:, shared:].sigmoid()], dim=-1
        )
        ids_TA = top_experts(scores_TE[:, :shared].detach(), self.num_active - 1)
        ids_TA = torch.cat([ids_TA, torch.full_like(ids_TA[:, :1], shared)], dim=-1)
        return Routing(ids_TA, weights_TE.gather(1, ids_TA), _counts(ids_TA, self.out_features))


ROUTERS: dict[RouterKind, type[nn.Module]] = {
    RouterKind.attention: AttentionRouter,
    RouterKind.linear: LinearRouter,
    RouterKind.shared_expert: SharedExpertRouter,
}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _counts(ids_TA: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(ids_TA.flatten(), minlength=num_experts)
