"""The mixture of experts: router, dispatch, experts, combine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptm.model.config import ModelConfig
from ptm.model.dispatch import Dispatcher, LocalDispatcher
from ptm.model.experts import Experts
from ptm.model.router import ROUTERS, Routing


class MixtureOfExperts(nn.Module):
    """`dispatcher` may be replaced after construction, to reach experts on other ranks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = ROUTERS[config.router](config)
        self.experts = Experts(config)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BLD: Tensor, real_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns y (B, L, D) and how many rows of real tokens each expert got, (E,) int64."""
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        routing: Routing = self.gate(x_TD)
        y_TD = self.dispatcher.run(x_TD, routing, self.experts)
        return y_TD.view_as(x_BLD), _real_counts(routing, real_BL)


def _real_counts(routing: Routing, real_BL: Tensor | None) -> Tensor:
    if real_BL is None:
        return routing.counts_E
    num_experts = routing.counts_E.numel()
    ids_TA = routing.ids_TA.masked_fill(~real_BL.reshape(-1, 1), num_experts)
    return torch.bincount(ids_TA.flatten(), minlength=num_experts + 1)[:num_experts]
