"""The token embedding."""

from __future__ import annotations

from torch import Tensor, nn

from ptm.kernels.embedding import embedding


class Embedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return embedding(ids, self.weight)
