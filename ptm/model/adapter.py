"""What is trained beside frozen weights: low-rank changes (ptm/model/lora.py), soft tokens, or a
prefix of every layer's keys and values.

Soft tokens are n learned embeddings that stand before each document: positions 0 to n - 1 of it,
seen by attention, filter and router as any token is. Their ids are -1 to -n. Whoever makes rows or
a prompt puts these ids there (`Transformer.soft_ids`), and the embedding reads `soft_tokens` for
them: so packed documents keep apart, and a model that is given no such ids is the base, bit for
bit. Source: Lester et al., arXiv 2104.08691.

A prefix is P learned keys, after their rotation, and values in each layer, which every position of
every document sees. It has no positions of its own, so rows, prompts and filters are as without it.
Source: Li and Liang, arXiv 2101.00190, without their second network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ptm.common.errors import RecipeError, line
from ptm.model.attention import Attention
from ptm.model.generate import row_seed
from ptm.model.lora import add_lora, use_lora
from ptm.model.lora_config import AdapterConfig, AdapterKind
from ptm.model.transformer import Transformer

SOFT_TOKENS = "model.embed_tokens.soft_tokens"
PREFIXES = ("prefix_keys", "prefix_values")


def add_adapter(model: Transformer, config: AdapterConfig) -> None:
    """Freeze every parameter and register those of the adapter without values; before an engine
    takes them. Nothing where there is no adapter."""
    if config.kind is AdapterKind.lora:
        add_lora(model, config)
    elif config.kind is AdapterKind.prompt:
        model.requires_grad_(False)
        weight = model.model.embed_tokens.weight
        made = weight.new_empty(config.prompt_tokens, weight.shape[1])
        model.model.embed_tokens.soft_tokens = nn.Parameter(made)
    elif config.kind is AdapterKind.prefix:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, Attention):
                weight = module.v_proj.weight
                for name in PREFIXES:
                    made = weight.new_empty(config.prompt_tokens, weight.shape[0])
                    setattr(module, name, nn.Parameter(made))


def use_adapter(model: Transformer, config: AdapterConfig) -> None:
    """After an engine has taken the parameters: have the model read them."""
    if config.kind is AdapterKind.lora:
        use_lora(model, config)


def first_ids(
    config: AdapterConfig, *, vocab_size: int, seed: int, encode: Callable[[str], list[int]]
) -> list[int]:
    """The words whose embeddings the soft tokens begin as. Raises RecipeError."""
    count, text = config.prompt_tokens, config.prompt_text
    if text is None:
        generator = torch.Generator().manual_seed(row_seed(seed, "soft tokens"))
        return torch.randint(vocab_size, (count,), generator=generator).tolist()
    ids = encode(text)
    if not ids:
        raise RecipeError(line("adapter.prompt_text", repr(text), "has no token", "leave it out"))
    return (ids * -(-count // len(ids)))[:count]
