"""The experts of one layer, stacked, so that they shard and page along their own first dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptm.kernels.moe_mlp import moe_mlp
from ptm.model.config import ModelConfig


class Experts(nn.Module):
    """w2 (silu(gate) * up) per expert, without biases. w1 (E, 2F, D) holds gate rows, then up rows;
    w2 (E, D, F)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(E, 2 * F, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F))

    def forward(
        self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor | None, counts_e: Tensor
    ) -> Tensor:
        """Each row through its experts, weighted and added up; see `moe_mlp`."""
        return moe_mlp(x_TD, ids_TA, weights_TA, counts_e, self.w1, self.w2)
