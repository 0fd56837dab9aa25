"""Small ordinary models as published folders, made without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ptm.checkpoint.safetensors_file import SafetensorsWriter
from ptm.export.ordinary_config import parse

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "shared_expert_intermediate_size": 96,
        "use_sliding_window": False,
        **QWEN,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        **QWEN,
        "norm_topk_prob": True,
    },
}
KINDS = tuple(CONFIGS)


def write_ordinary(folder: Path, kind: str, *, is_fused: bool = False, **keys: Any) -> Path:
    """A folder of random bf16 weights, heavy-tailed; `is_fused` has a layer's experts in one."""
    config = {**BASE, **CONFIGS[kind], **keys}
    model = parse(config)
    g = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in model.shapes().items():
        x = torch.randn(shape, generator=g)
        if "norm" in name:
            x = 1 + 0.2 * x
        elif len(shape) > 1:
            x = x * torch.exp(0.5 * torch.randn(shape, generator=g)) / shape[1] ** 0.5
        tensors[published_name(kind, name)] = x.to(torch.bfloat16)
    if is_fused:
        tensors = fused(tensors)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    with SafetensorsWriter(folder / "model.safetensors", header, {"format": "pt"}) as file:
        for name in file.names:
            file.write(name, tensors[name].contiguous())
    return folder


def published_name(kind: str, name: str) -> str:
    if kind != "mixtral" or ".mlp." not in name:
        return name
    for new, old in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = name.replace(new, old)
    return name.replace(".mlp.", ".block_sparse_moe.")


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers has experts in memory."""
    found, parts = {}, {}
    for name, x in tensors.items():
        name = name.replace("block_sparse_moe", "mlp")
        head, is_expert, tail = name.partition(".mlp.experts.")
        if not is_expert:
            found[name] = x
            continue
        e, part, _ = tail.split(".")
        part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(part, part)
        parts.setdefault(head, {})[part, int(e)] = x
    for head, matrices in parts.items():
        count = len(matrices) // 3
        of = {p: [matrices[f"{p}_proj", e] for e in range(count)] for p in ("gate", "up", "down")}
        both = [torch.cat([a, b]) for a, b in zip(of["gate"], of["up"])]
        found[f"{head}.mlp.experts.gate_up_proj"] = torch.stack(both)
        found[f"{head}.mlp.experts.down_proj"] = torch.stack(of["down"])
    return found
