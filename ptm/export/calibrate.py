"""Calibration text: which rows, so that every expert of every layer sees its share of it.

The model as it is runs once over twice the rows that were asked for, layer by layer, and only who
chose which expert is kept. The first half is taken; then, as long as an expert has fewer tokens
than its share, the row that fills most of what is missing is added. What is still missing is told,
and filled with tokens of others when that expert is quantized (ptm/export/stages.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ptm.checkpoint.source import TensorSource
from ptm.export.crew import Crew
from ptm.model.block import Block
from ptm.model.config import ModelConfig
from ptm.model.context import Context, make_context
from ptm.model.hf_names import EMBEDDING
from ptm.model.router import Routing

SHARE = 0.25
"""Of the tokens an expert gets when all get as many."""
MOST_SHARE_ROWS = 1024
"""Tokens of one expert that are enough for any layer."""


class Text(NamedTuple):
    """Rows of tokens as batches (B, L), with the context of each; ordinary models have none."""

    ids: list[Tensor]
    contexts: list[Context]

    @property
    def num_tokens(self) -> int:
        return sum(ids.numel() for ids in self.ids)


def make_text(
    config: ModelConfig, ids_RL: Tensor, documents_RL: Tensor, micro_batch_size: int
) -> Text:
    """Batches of rows, in order."""
    ids = list(ids_RL.split(micro_batch_size))
    documents = documents_RL.split(micro_batch_size)
    contexts = [make_context(config, a, document_ids_BL=d) for a, d in zip(ids, documents)]
    return Text(ids, contexts)


def load_block(config: ModelConfig, weights: TensorSource, layer: int, dtype: torch.dtype) -> Block:
    """One layer with its weights in `dtype`; nothing else of the model is in memory."""
    with torch.device("meta"):
        block = Block(config)
    block = block.to(dtype).to_empty(device="cpu").eval()
    for name, tensor in block.state_dict().items():
        stored = weights.read(f"model.layers.{layer}.{name}")
        tensor.copy_(stored.view(tensor.shape))
    return block


def embed(weights: TensorSource, text: Text, dtype: torch.dtype) -> list[Tensor]:
    table = weights.read(EMBEDDING).to(dtype)
    return [torch.nn.functional.embedding(ids, table) for ids in text.ids]


@torch.no_grad()
def routed_rows(
    config: ModelConfig,
    weights: TensorSource,
    text: Text,
    dtype: torch.dtype,
    advance: Callable[[], None],
    crew: Crew,
) -> Tensor:
    """Tokens of each row that chose each expert, (layers, R, E) int64; `advance` after a layer."""
    mine, found = crew.batches(len(text.ids)), []
    text = Text(text.ids[mine], text.contexts[mine])
    rows = embed(weights, text, dtype)
    for layer in range(config.num_hidden_layers):
        block = load_block(config, weights, layer, dtype)
        counts = []
        for i, (x, context) in enumerate(zip(rows, text.contexts)):
            x = x + block.self_attn(block.input_layernorm(x), context)
            normed = block.post_attention_layernorm(x)
            counts.append(_counts(block, normed, config.num_experts))
            rows[i] = x + block.mlp(normed, context.real_BL).y_BLD
        if counts:
            found.append(torch.cat(counts))
        advance()
    return join_counts(found, crew)


def join_counts(found: list[Tensor], crew: Crew) -> Tensor:
    """Counts (R, E) of each layer over this rank's rows -> (layers, R, E) over all."""
    mine = {str(crew.rank): torch.stack(found)} if found else {}
    return torch.cat(list(crew.exchange(mine).values()), 1)


def _counts(block: Block, normed_BLD: Tensor, num_experts: int) -> Tensor:
    B, L, D = normed_BLD.shape
    routing: Routing = block.mlp.gate(normed_BLD.reshape(-1, D))
    by_row = routing.ids_TA.view(B, -1)
    return torch.nn.functional.one_hot(by_row, num_experts).sum(1)


def share_of(num_tokens: int, num_experts: int, experts_per_token: int) -> int:
    """Tokens that an expert should see, of so many in all; 0 where there are no experts."""
    even = num_tokens * experts_per_token / max(num_experts, 1)
    return min(int(SHARE * even), MOST_SHARE_ROWS)


def choose_rows(counts_LRE: Tensor, num_rows: int, share: int) -> list[int]:
    """The first `num_rows` rows, and those added for experts with fewer than `share` tokens."""
    by_row = counts_LRE.permute(1, 0, 2).flatten(1)
    chosen = list(range(min(num_rows, len(by_row))))
    left = list(range(len(chosen), len(by_row)))
    missing = (share - by_row[chosen].sum(0)).clamp(min=0)
    while left and bool(missing.any()):
        gains = torch.minimum(by_row[left], missing).sum(1)
        best = int(gains.argmax())
        if not int(gains[best]):
            break
        row = left.pop(best)
        chosen.append(row)
        missing = (missing - by_row[row]).clamp(min=0)
    return chosen
