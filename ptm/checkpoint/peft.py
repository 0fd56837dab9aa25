"""An adapter as PEFT's files: adapter_config.json and adapter_model.safetensors, which PEFT puts on
the published form of the base.

    role      PEFT's module, in layout hf     A                    B
    v, o      v_proj, o_proj                  as ours              as ours
    q, k      q_proj and k_proj               as ours              with rows of zeros, as PEFT
                                                                   changes whole matrices only
    experts   each expert's w1 and w2         its (r, in)          its (out, r)
    lfa       none: PEFT adds to what a convolution puts out, and the filter reads its weights

Where several changes meet in one matrix (q and k; in layout hf2 q_proj and k_proj as well), their A
stand below each other and their B beside each other: rank and alpha grow alike, by `rank_pattern`
and `alpha_pattern`, so that alpha / rank stays. Soft tokens are `prompt_embeddings`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptm.checkpoint.hf import Opened
from ptm.checkpoint.manifest import write_file
from ptm.checkpoint.merged import MergedSource
from ptm.checkpoint.safetensors_file import SafetensorsWriter
from ptm.checkpoint.shards import cast
from ptm.common.errors import CheckpointError, line
from ptm.model.adapter import SOFT_TOKENS
from ptm.model.config import ModelConfig
from ptm.model.hf_names import Layout, published
from ptm.model.lora import changed
from ptm.model.lora_config import AdapterKind

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE, PREFIX, PROMPT = "base_model_name_or_path", "base_model.model.", "prompt_embeddings"


def write_peft(folder: Path, opened: Opened, *, layout: Layout, dtype: torch.dtype | None) -> int:
    """Fill `folder` with the adapter of an adapter run; returns its parameters. Raises
    CheckpointError."""
    adapter = opened.weights
    if not isinstance(adapter, MergedSource):
        remedy = "name a run of adapter.kind=lora or prompt, or give to=hf"
        raise CheckpointError(line("source", opened.folder, "holds no adapter", remedy))
    model, config = opened.model, adapter.config
    keys: dict[str, Any] = {
        BASE: str(adapter.base_folder.resolve()),
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    if config.kind is AdapterKind.prompt:
        tensors = {PROMPT: adapter.read(SOFT_TOKENS)}
        keys |= {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": config.prompt_tokens,
            "token_dim": model.hidden_size,
            "num_layers": model.num_hidden_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_transformer_submodules": 1,
        }
    elif config.kind is AdapterKind.prefix:
        rule = "is not written, as the published filter reads PEFT's cache as its own"
        remedy = "use generate or eval with the run"
        raise CheckpointError(line("adapter.kind", config.kind, rule, remedy))
    else:
        changes = peft_changes(adapter, model, layout)
        tensors = {
            f"{PREFIX}{module}.lora_{which}.weight": tensor
            for module, pair in changes.items()
            for which, tensor in zip("AB", pair)
        }
        ranks = {any_number(module): len(a) for module, (a, _) in changes.items()}
        others = {module: rank for module, rank in ranks.items() if rank != config.rank}
        scale = config.alpha / config.rank
        keys |= {
            "peft_type": "LORA",
            "r": config.rank,
            "lora_alpha": config.alpha,
            "target_modules": "|".join(ranks),  # a regular expression of whole names
            "rank_pattern": others,
            "alpha_pattern": {module: scale * rank for module, rank in others.items()},
            "bias": "none",
        }
    tensors = {name: cast(name, t, dtype or t.dtype).contiguous() for name, t in tensors.items()}
    header = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with SafetensorsWriter(folder / WEIGHTS, header, {"format": "pt"}) as file:
        for name in file.names:
            file.write(name, tensors[name])
    write_file(folder / CONFIG, (json.dumps(keys, indent=2) + "\n").encode())
    return sum(tensor.numel() for tensor in tensors.values())


def any_number(module: str) -> str:
    """A name as an expression for that of every layer and expert."""
    return re.sub(r"\b\d+\b", r"\\d+", module)


def peft_changes(
    adapter: MergedSource, model: ModelConfig, layout: Layout
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every published linear that is changed."""
    if "lfa" in adapter.config.targets:
        rule = "cannot be said in PEFT, which adds to what a convolution puts out"
        raise CheckpointError(line("adapter.targets", "lfa", rule, "give to=hf, which merges"))
    found = {}
    for name, rows in published(model, layout, tied_copy=False).items():
        all_a, all_b, first = [], [], 0
        for piece in rows.pieces:
            is_stack = len(adapter.info(piece.name).shape) == 3
            num_rows = rows.shape[0] if is_stack else piece.stop - piece.start
            for role, a, b in adapter.changes_of(piece.name):
                if is_stack:
                    a, b = a[piece.start], b[piece.start]
                wide = b.new_zeros(rows.shape[0], b.shape[1])
                part, one = wide[first : first + num_rows], torch.eye(b.shape[1], dtype=b.dtype)
                part.copy_(changed(part, one, b, role=role, scale=1.0, head_dim=model.head_dim))
                all_a.append(a)
                all_b.append(wide)
            first += num_rows
        if all_a:
            found[name.removesuffix(".weight")] = torch.cat(all_a), torch.cat(all_b, dim=1)
    return found
