"""Ordinary Hugging Face models, as far as quantizing them needs: Llama, Mixtral, Qwen2-MoE and
Qwen3-MoE.

`parse` reads a stranger's config.json by name and refuses what would be another arithmetic (a
sliding window, another activation, a stretched rotary embedding that is not known here). `shapes`
then has every tensor of the model under the names of its checkpoint:

    model.layers.I.self_attn.{q,k,v,o}_proj     biases: Llama, Qwen3 all or none; Qwen2 q, k, v
    model.layers.I.self_attn.{q,k}_norm         Qwen3: RMS norm of each head
    model.layers.I.mlp.{gate,up,down}_proj      a layer without experts
    model.layers.I.mlp.experts.E.{gate,up,down}_proj, mlp.gate, mlp.shared_expert..., _gate
    model.layers.I.block_sparse_moe.experts.E.{w1,w3,w2}, block_sparse_moe.gate       Mixtral, old

Mixtral is published under the old names, and GPTQModel reads and writes it under the new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptm.common.config import Choice
from ptm.common.errors import CheckpointError, line

_ABSENT = object()
MOST_LAYERS, MOST_EXPERTS, MOST_SIZE = 1024, 1024, 2**24


class Kind(Choice):
    """model_type of config.json."""

    llama = "llama"
    mixtral = "mixtral"
    qwen2_moe = "qwen2_moe"
    qwen3_moe = "qwen3_moe"


@dataclass(frozen=True)
class Ordinary:
    """Numbers of a model. dense_layers: those without experts; rope: the parameters of the rotary
    embedding, `rope_type` default or llama3."""

    kind: Kind
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Mapping[str, Any]
    max_positions: int
    is_tied: bool
    biased: tuple[str, ...]
    mlp_size: int
    expert_size: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    is_renormalized: bool = True
    shared_size: int = 0
    dense_layers: frozenset[int] = frozenset()
    has_old_names: bool = False
    "Of Mixtral's experts."

    @property
    def moe(self) -> str:
        """Name of the part of a layer that has experts."""
        return "block_sparse_moe" if self.has_old_names else "mlp"

    @property
    def parts(self) -> tuple[str, str, str]:
        """Names of gate, up and down of an expert."""
        if self.has_old_names:
            return "w1", "w3", "w2"
        return "gate_proj", "up_proj", "down_proj"

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """Linears of a layer that may be quantized, by their names in it, and their shapes."""
        D, heads, kv = self.hidden_size, self.num_heads, self.num_kv_heads
        K = self.head_dim
        found = {
            "self_attn.q_proj": (heads * K, D),
            "self_attn.k_proj": (kv * K, D),
            "self_attn.v_proj": (kv * K, D),
            "self_attn.o_proj": (D, heads * K),
        }
        if not self.has_experts(layer):
            return found | _mlp("mlp.", ("gate_proj", "up_proj", "down_proj"), D, self.mlp_size)
        for e in range(self.num_experts):
            found |= _mlp(f"{self.moe}.experts.{e}.", self.parts, D, self.expert_size)
        if self.shared_size:
            names = ("gate_proj", "up_proj", "down_proj")
            found |= _mlp("mlp.shared_expert.", names, D, self.shared_size)
        return found

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of a layer by its name in it."""
        D, linears = self.hidden_size, self.linears(layer)
        found: dict[str, tuple[int, ...]] = {
            f"{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")
        }
        found |= {f"{name}.weight": shape for name, shape in linears.items()}
        found |= {f"self_attn.{p}.bias": (linears[f"self_attn.{p}"][0],) for p in self.biased}
        if self.kind is Kind.qwen3_moe:
            found |= {f"self_attn.{p}_norm.weight": (self.head_dim,) for p in "qk"}
        if self.has_experts(layer):
            found[f"{self.moe}.gate.weight"] = (self.num_experts, D)
            if self.shared_size:
                found["mlp.shared_expert_gate.weight"] = (1, D)
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model."""
        D, V = self.hidden_size, self.vocab_size
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            found |= {prefix + name: shape for name, shape in self.layer_shapes(layer).items()}
        found["model.norm.weight"] = (D,)
        if not self.is_tied:
            found["lm_head.weight"] = (V, D)
        return found


def is_ordinary(keys: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model of this file."""
    return keys.get("model_type") in set(Kind)


def parse(keys: Mapping[str, Any]) -> Ordinary:
    """Read a config.json. Raises CheckpointError naming the key."""
    kind = Kind(keys["model_type"])
    of = _Reader(keys)
    of.only("hidden_act", "silu")
    of.only("mlp_bias", False)
    of.only("pretraining_tp", 1)
    of.only("quantization_config", None)
    if keys.get("use_sliding_window", True):
        of.only("sliding_window", None, 0)
    hidden, heads = of.count("hidden_size"), of.count("num_attention_heads")
    kv = of.count("num_key_value_heads", heads)
    head = of.count("head_dim", hidden // heads)
    if heads % kv or head % 2:
        raise of.refuse("num_key_value_heads", kv, f"must divide the {heads} heads")
    moe: dict[str, Any] = {}
    layers = of.count("num_hidden_layers", most=MOST_LAYERS)
    mlp_size = of.count("intermediate_size")
    if kind is not Kind.llama:
        name = "num_local_experts" if "num_local_experts" in keys else "num_experts"
        num_experts = of.count(name, most=MOST_EXPERTS)
        moe = {
            "num_experts": num_experts,
            "experts_per_token": of.count("num_experts_per_tok", most=num_experts),
            "expert_size": mlp_size,
        }
    if kind in (Kind.qwen2_moe, Kind.qwen3_moe):
        moe["expert_size"] = of.count("moe_intermediate_size")
        moe["is_renormalized"] = of.flag("norm_topk_prob", False)
        step = of.count("decoder_sparse_step", 1)
        dense = keys.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(i) is int for i in dense):
            raise of.refuse("mlp_only_layers", dense, "must be a list of layers")
        skipped = (i for i in range(layers) if (i + 1) % step)
        moe["dense_layers"] = frozenset(dense) | frozenset(skipped)
    if kind is Kind.qwen2_moe:
        moe["shared_size"] = of.count("shared_expert_intermediate_size")
    biased: tuple[str, ...] = ()
    if kind is Kind.qwen2_moe and of.flag("qkv_bias", True):
        biased = ("q_proj", "k_proj", "v_proj")
    elif kind in (Kind.llama, Kind.qwen3_moe) and of.flag("attention_bias", False):
        biased = ("q_proj", "k_proj", "v_proj", "o_proj")
    return Ordinary(
        kind,
        vocab_size=of.count("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head,
        norm_eps=of.number("rms_norm_eps"),
        rope=of.rope(),
        max_positions=of.count("max_position_embeddings", 2048),
        is_tied=of.flag("tie_word_embeddings", False),
        biased=biased,
        mlp_size=mlp_size,
        **moe,
    )


class _Reader:
    """Values of a config.json, each checked as it is taken."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self.keys = keys

    def count(self, key: str, default: int | None = None, most: int = MOST_SIZE) -> int:
        value = self.keys.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= most:
            raise self.refuse(key, value, f"must be a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.keys.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise self.refuse(key, value, "must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.keys.get(key, default)
        if type(value) is not bool:
            raise self.refuse(key, value, "must be true or false")
        return value

    def only(self, key: str, *known: Any) -> None:
        value = self.keys.get(key, _ABSENT)
        if value is not _ABSENT and value not in known:
            raise self.refuse(key, value, f"must be {known[0]}")

    def rope(self) -> dict[str, Any]:
        """The rotary embedding's parameters, of the old keys or the new one."""
        found = self.keys.get("rope_parameters") or self.keys.get("rope_scaling") or {}
        if not isinstance(found, dict):
            raise self.refuse("rope_parameters", found, "must be an object")
        found = {"rope_theta": self.keys.get("rope_theta", 10000.0), **found}
        kind = found.get("rope_type", found.get("type", "default"))
        wanted = ["rope_theta"]
        if kind == "llama3":
            wanted += ["factor", "low_freq_factor", "high_freq_factor"]
            wanted += ["original_max_position_embeddings"]
        elif kind != "default":
            raise self.refuse("rope_type", kind, "must be default or llama3")
        inner = _Reader(found)
        if found.get("partial_rotary_factor", 1.0) != 1.0:
            raise self.refuse("partial_rotary_factor", found["partial_rotary_factor"], "must be 1")
        return {"rope_type": kind, **{key: inner.number(key) for key in wanted}}

    def refuse(self, key: str, value: Any, rule: str) -> CheckpointError:
        return CheckpointError(
            "config.json: " + line(key, value, rule, "quantize a model that ptm knows")
        )


def _mlp(prefix: str, names: tuple[str, str, str], D: int, F: int) -> dict[str, tuple[int, int]]:
    gate, up, down = (prefix + name for name in names)
    return {gate: (F, D), up: (F, D), down: (D, F)}
