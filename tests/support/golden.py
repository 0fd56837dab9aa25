"""Reading fixture folders made by running the published Hugging Face code: tensors in its names,
our model out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ptm.model.config import ModelConfig, RopeMode
from ptm.model.transformer import Transformer

FOLDERS = sorted(p.parent for p in Path(__file__).parents[1].glob("golden/*/config.json"))


def read(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def config_of(folder: Path, **changes) -> ModelConfig:
    """Our section for a fixture's config.json; the fixtures' main numbers come from HF's rotary
    tables."""
    hf = json.loads((folder / "config.json").read_text())
    assert hf["moe_config"]["norm_topk_prob"] and hf["moe_config"]["gated_linear_unit"]
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads attention_projection_size "
        "rms_norm_eps max_position_embeddings tie_word_embeddings"
    )
    return ModelConfig(
        **{
            **{name: hf[name] for name in names.split()},
            "num_experts": hf["moe_config"]["moe_num_experts"],
            "num_experts_per_tok": hf["moe_config"]["moe_top_k"],
            "moe_intermediate_size": hf["moe_config"]["ffn_hidden_size"],
            "rope_mode": RopeMode.hf_bf16,
            **changes,
        }
    )


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, **changes) -> Transformer:
    """The fixture's model with its weights, in eval mode."""
    model = Transformer(config_of(folder, **changes), dtype=dtype)
    published = read(folder, "model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(of_ours(name, published, model.config))
    return model.eval()


def of_ours(name: str, published: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """The tensor of our name, stacked from published ones if it holds experts; works on gradients
    as well."""
    if ".experts." not in name:
        return published[name]
    prefix, matrix = name.rsplit(".", 1)
    return torch.stack(
        [published[f"{prefix}.{e}.{matrix}.weight"] for e in range(config.num_experts)]
    )
