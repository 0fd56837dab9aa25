"""What every layer must know about the positions of one forward; made once and shared by all.

Documents, padding and filler are one idea here, the *segment*: a run of positions that may see each
other. Padding is segment -1. Under `isolate_documents` each document is a segment; without it all
real tokens are one, as published, and documents only restart the positions. Attention is causal
within a segment, and the localized filter is cut wherever a position does not continue the segment
of the one before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptm.kernels.rope import rope_angles
from ptm.model.cache import Cache
from ptm.model.config import ModelConfig

PADDING = -1  # the document id of padding and filler
NOTHING = -2  # the document id of positions before the start


class Context(NamedTuple):
    """Made by `make_context`, read by every block."""

    cos_BLR: Tensor
    sin_BLR: Tensor
    see_BLS: Tensor | None
    "Bool: what each query may attend to; None: everything up to itself."
    connected_BL: Tensor | None
    "Bool: whether a row continues the one before; None: all but the first. L + 2 with a cache."
    real_BL: Tensor | None
    "Bool: False at padding and filler, which is not counted; None: all are real."
    routes_BLNA: Tensor | None = None
    "Ids of the A experts of each token in each of N layers, where they are given."
    routes_TA: Tensor | None = None
    "Those of one layer."

    def of_layer(self, index: int) -> Context:
        """What the block of that layer reads."""
        if self.routes_BLNA is None:
            return self
        return self._replace(routes_TA=self.routes_BLNA[:, :, index].flatten(0, 1))


def make_context(
    config: ModelConfig,
    input_ids_BL: Tensor,
    *,
    position_ids_BL: Tensor | None = None,
    document_ids_BL: Tensor | None = None,
    attention_mask_BL: Tensor | None = None,
    cache: Cache | None = None,
) -> Context:
    """Work out positions and masks of `input_ids_BL`, and record the tokens in the cache if there
    is one.

    document_ids: -1 is filler. attention_mask: 0 is padding; both speak of the new tokens only, as
    the cache remembers the rest. position_ids: by default 0, 1, ... within each document.
    """
    documents_BL = document_ids_BL
    if attention_mask_BL is not None:
        base = torch.zeros_like(input_ids_BL) if documents_BL is None else documents_BL
        documents_BL = base.masked_fill(attention_mask_BL == 0, PADDING)
    real_BL = None if documents_BL is None else documents_BL != PADDING
    if documents_BL is None:
        documents_BL = torch.zeros_like(input_ids_BL)
    past_BS = documents_BL[:, :0] if cache is None else cache.documents_BS
    documents_BS = documents_BL if past_BS is None else torch.cat([past_BS, documents_BL], dim=1)

    if position_ids_BL is None:
        position_ids_BL = _positions(documents_BS, documents_BL.shape[1], cache)
    cos_BLR, sin_BLR = rope_angles(
        position_ids_BL,
        rotary_dim=config.rotary_dim,
        base=config.rope_theta,
        mode=config.rope_mode.value,
    )
    if cache is not None:
        cache.documents_BS = documents_BS
        cache.next_position_B = position_ids_BL[:, -1] + 1

    segments_BS = documents_BS if config.isolate_documents else documents_BS.clamp(max=0)
    L, S = documents_BL.shape[1], segments_BS.shape[1]
    is_one_segment = bool((segments_BS == segments_BS[:, :1]).all())
    see_BLS = None if is_one_segment else _visible(segments_BS, L)
    if cache is not None:  # the filter gets two more rows in front, from the cache
        before = segments_BS.new_full((segments_BS.shape[0], 2), NOTHING)
        connected_BL = _continues(torch.cat([before, segments_BS], dim=1)[:, S - L :])
    else:
        connected_BL = None if is_one_segment else _continues(segments_BS)
    return Context(cos_BLR, sin_BLR, see_BLS, connected_BL, real_BL)


def _positions(documents_BS: Tensor, num_new: int, cache: Cache | None) -> Tensor:
    """Count from the start of each document, going on from the cache in the one that was open."""
    if cache is None or cache.next_position_B is None:
        going_on_B1 = documents_BS.new_zeros(documents_BS.shape[0], 1)
    else:
        going_on_B1 = cache.next_position_B[:, None]
    L, S = num_new, documents_BS.shape[1]
    index_L = torch.arange(L, device=documents_BS.device)
    starts_BL = (~_continues(documents_BS))[:, S - L :]
    start_BL = torch.where(starts_BL, index_L, -1).cummax(1).values
    return torch.where(start_BL < 0, going_on_B1 + index_L, index_L - start_BL)


def _continues(segments_BL: Tensor) -> Tensor:
    same = torch.zeros_like(segments_BL, dtype=torch.bool)
    torch.eq(segments_BL[:, 1:], segments_BL[:, :-1], out=same[:, 1:])
    return same


def _visible(segments_BS: Tensor, num_new: int) -> Tensor:
    S = segments_BS.shape[1]
    same_BLS = segments_BS[:, S - num_new :, None] == segments_BS[:, None, :]
    return same_BLS.tril_(S - num_new)
