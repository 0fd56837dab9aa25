"""The mixture of experts: router, dispatch, experts, combine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptm.model.config import ModelConfig
from ptm.model.dispatch import Dispatcher, LocalDispatcher
from ptm.model.experts import Experts
from ptm.model.router import ROUTERS, Routing, balance_loss, rerouted


class Mixed(NamedTuple):
    """What comes out of a layer, or of a block: rows (B, L, D); how many rows of real tokens each
    expert got, (E,) int64; and the layer's balance loss, in training and where it counts."""

    y_BLD: Tensor
    counts_E: Tensor
    imbalance: Tensor | None


class MixtureOfExperts(nn.Module):
    """`dispatcher` may be replaced after construction, to reach experts on other ranks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = ROUTERS[config.router](config)
        self.experts = Experts(config)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.has_balance_loss = config.router_aux_loss_coef > 0

    def forward(
        self,
        x_BLD: Tensor,
        real_BL: Tensor | None = None,
        bias_E: Tensor | None = None,
        routes_TA: Tensor | None = None,
    ) -> Mixed:
        """real (B, L) bool: what is counted; bias (E,): added to what the router ranks; routes:
        ids of the experts to use instead of its choice."""
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        routing: Routing = self.gate(x_TD) if bias_E is None else self.gate(x_TD, bias_E)
        if routes_TA is not None:
            routing = rerouted(routing, routes_TA)
        y_TD = self.dispatcher.run(x_TD, routing, self.experts)
        counts_E = _real_counts(routing, real_BL)
        imbalance = None
        if self.has_balance_loss and self.training:
            num_routed = routing.scores_TE.shape[1]
            real_T = None if real_BL is None else real_BL.reshape(-1)
            imbalance = balance_loss(routing.scores_TE, counts_E[:num_routed], real_T)
        return Mixed(y_TD.view_as(x_BLD), counts_E, imbalance)


def _real_counts(routing: Routing, real_BL: Tensor | None) -> Tensor:
    if real_BL is None:
        return routing.counts_E
    num_experts = routing.counts_E.numel()
    ids_TA = routing.ids_TA.masked_fill(~real_BL.reshape(-1, 1), num_experts)
    return torch.bincount(ids_TA.flatten(), minlength=num_experts + 1)[:num_experts]
