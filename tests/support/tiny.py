"""A model of half a million weights, and batches for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptm.model.config import ModelConfig
from ptm.model.transformer import Transformer


def tiny_config(**changes) -> ModelConfig:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_projection_size": 64,
        "num_experts": 32,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "max_position_embeddings": 256,
    }
    return ModelConfig(**{**sizes, **changes})


def tiny_model(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes) -> Transformer:
    """New weights, ten times the usual, so that tokens differ, and routers that spread them."""
    model = Transformer(tiny_config(**{"initializer_range": 0.2, **changes}), dtype=dtype)
    model.init_weights(seed)
    return model.eval()


class Batch(NamedTuple):
    """As the data pipeline makes them; (B, L) each."""

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor


def documents(*lengths: int, vocab_size: int = 96, seed: int = 0) -> list[Tensor]:
    """Random documents; the last token of each is only ever a label."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n + 1,), generator=generator) for n in lengths]


def packed(rows: list[list[Tensor]]) -> Batch:
    """Rows of documents of equal total length, labels within each document."""
    made = []
    for row in rows:
        ids = [torch.full((len(d) - 1,), i) for i, d in enumerate(row)]
        columns = (
            torch.cat([d[:-1] for d in row]),
            torch.cat([d[1:] for d in row]),
            torch.ones(sum(len(d) - 1 for d in row), dtype=torch.bool),
            torch.cat([torch.arange(len(d) - 1) for d in row]),
            torch.cat(ids),
        )
        made.append(columns)
    return Batch(*(torch.stack(column) for column in zip(*made)))
