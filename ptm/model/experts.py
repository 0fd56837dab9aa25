"""The experts of one layer, stacked, so that they shard and page along their own first dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptm.kernels.grouped_gemm import swiglu_experts
from ptm.model.config import ModelConfig


class Experts(nn.Module):
    """w2 (silu(gate) * up) per expert, without biases. w1 (E, 2F, D) holds gate rows, then up rows;
    w2 (E, D, F)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(E, 2 * F, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F))

    def forward(self, x_RD: Tensor, counts_e: Tensor) -> Tensor:
        return swiglu_experts(x_RD, self.w1, self.w2, counts_e)
