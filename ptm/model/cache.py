"""What generation keeps of the tokens already seen: keys and values, and two rows for the localized
filter.

    Cache                     made empty by the caller, handed to every forward, which appends to it
      documents (B, S)   which document each position belongs to, -1 for padding
      next_position (B,) where positions go on
      layers[i]          keys, values (B, H, capacity, K), grown by doubling; keys already rotated
                         recent (B, 2, D), the last two rows that entered the filter, at first zero

Any number of tokens may be appended at once: a long prompt in pieces, then one token at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """One layer's part; lengths are those of the keys appended."""

    def __init__(self) -> None:
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.recent_B2D: Tensor | None = None

    def append(self, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return all so far, (B, H, S, K) each."""
        start, self.length = self.length, self.length + k_BHLK.shape[2]
        self.keys = _grown(self.keys, k_BHLK, start, self.length)
        self.values = _grown(self.values, v_BHLK, start, self.length)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def filter_input(self, n_BLD: Tensor) -> Tensor:
        """Put the last two rows in front of the new ones, (B, L + 2, D), and keep the last two of
        that."""
        if self.recent_B2D is None:
            self.recent_B2D = n_BLD.new_zeros(n_BLD.shape[0], 2, n_BLD.shape[2])
        rows = torch.cat([self.recent_B2D, n_BLD], dim=1)
        self.recent_B2D = rows[:, -2:].clone()
        return rows


class Cache:
    """State of `num_layers` layers for one batch of sequences."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.documents_BS: Tensor | None = None
        self.next_position_B: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return 0 if self.documents_BS is None else self.documents_BS.shape[1]


def _grown(store: Tensor | None, new_BHLK: Tensor, start: int, end: int) -> Tensor:
    B, H, _, K = new_BHLK.shape
    if store is None or store.shape[2] < end:
        larger = new_BHLK.new_empty(B, H, max(end, 2 * start), K)
        if store is not None:
            larger[:, :, :start] = store[:, :, :start]
        store = larger
    store[:, :, start:end] = new_BHLK
    return store
