"""The token embedding, and soft tokens where there are some (ptm/model/adapter.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptm.kernels.embedding import embedding


class Embedding(nn.Embedding):
    """Rows of `weight` by id; of `soft_tokens` by -1 - id for ids below 0."""

    soft_tokens: nn.Parameter | None

    def __init__(self, num_embeddings: int, width: int):
        super().__init__(num_embeddings, width)
        self.register_parameter("soft_tokens", None)

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        if self.soft_tokens is None:
            return embedding(ids, self.weight)
        soft = embedding((-1 - ids).clamp(min=0), self.soft_tokens)
        # Not assigned in place: a batch without such ids must reach the parameter's gradient too.
        return torch.where(ids[..., None] < 0, soft, embedding(ids.clamp(min=0), self.weight))
