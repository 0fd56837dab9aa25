"""RMSNorm with its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptm.kernels.rmsnorm import rms_norm


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
