"""config.json of a published folder -> ModelConfig, and back.

The file is a stranger's, so it is read through lists: keys that we use, keys that we only carry so
that a rebuilt folder has them again, and keys that must have the one value under which our
arithmetic is the published one. Whatever else is in it is ignored with a note. That goes for
`auto_map` too, which published folders of this family have: it names Python files beside the
weights, and ptm never runs code of a model folder. Keys that only exist to run code are refused.

`norm_topk_prob` must be true: only then is the published code's routing the one that the weights
were trained with. The rotary base is `rotary_base` (or `rope_theta`), else 10000.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ptm.checkpoint.safetensors_file import MAX_TENSORS
from ptm.common.errors import CheckpointError, RecipeError, line
from ptm.model.config import ModelConfig, RopeMode
from ptm.model.hf_names import num_published

FILE = "config.json"
MOE = "moe_config"

_SIZES = {  # ours -> theirs, whole numbers that the file must have
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",  # absent means 32 in the published code, not 16
    "attention_projection_size": "attention_projection_size",
    "max_position_embeddings": "max_position_embeddings",
}
_MOE_SIZES = {
    "num_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
    "moe_intermediate_size": "ffn_hidden_size",
}
_OPTIONAL = {"rms_norm_eps": float, "initializer_range": float, "tie_word_embeddings": bool}
_BASES = ("rotary_base", "rope_theta")
_CARRIED = {
    "architectures": list,
    "intermediate_size": int,
    "model_max_length": int,
    "use_cache": bool,
    "pad_token_id": int,
    "bos_token_id": int,
    "eos_token_id": int,
    "use_flash_attention": bool,
    "dropout": float,
    "eod_token": int,
    "sep_token": int,
    "use_loss_mask": bool,
    "reset_attention_mask": bool,
    "reset_position_ids": bool,
    "output_router_logits": bool,
    "torch_dtype": str,
    "dtype": str,
    "transformers_version": str,
}
_ONLY: dict[str, tuple[Any, ...]] = {  # anything else would be another model, or code to run
    "model_type": ("yuan", "yuan2"),
    "hidden_act": ("silu",),
    "causal_mask": (True,),
    "use_moe": (True,),
    "use_bias": (False,),
    "attention_bias": (False,),
    "use_shareqk": (False,),
    "use_yarn": (False,),
    "rope_scaling": (None,),
    "rotary_percent": (0.5, 1.0),  # of the head size, or of hidden / heads: the same dims
    "rotary_interleaved": (False,),
    "logit_scale": (1.0,),
    "quantization_config": (None,),
    "trust_remote_code": (False,),
    "_attn_implementation_internal": (None,),
}
_MOE_ONLY: dict[str, tuple[Any, ...]] = {
    "norm_topk_prob": (True,),
    "gated_linear_unit": (True,),
    "per_layer_experts_blocks": (None,),
}
# What the published code reads, as a model of ours has it; the order is that of a published file.
_DEFAULTS: dict[str, Any] = {
    "architectures": ["YuanForCausalLM"],
    "model_type": "yuan",
    "hidden_act": "silu",
    "use_cache": True,
    "causal_mask": True,
    "use_flash_attention": False,
    "dropout": 0.0,
    "use_loss_mask": False,
    "reset_attention_mask": False,
    "reset_position_ids": False,
    "output_router_logits": False,
    "use_moe": True,
    MOE: {"norm_topk_prob": True, "gated_linear_unit": True},
}


class Parsed(NamedTuple):
    """What a config.json says: the model, the keys to carry, and notes on what was ignored."""

    model: ModelConfig
    carried: dict[str, Any]
    notes: tuple[str, ...]


def parse(keys: dict[str, Any]) -> Parsed:
    """Read a config.json's keys. Raises CheckpointError naming the key."""
    moe = keys.get(MOE)
    if not isinstance(moe, dict):
        raise _refuse(MOE, moe, "must be an object", "ptm reads mixtures of experts only")
    values: dict[str, Any] = {ours: _size(keys, key) for ours, key in _SIZES.items()}
    values |= {ours: _size(moe, key, f"{MOE}.") for ours, key in _MOE_SIZES.items()}
    for key, kind in _OPTIONAL.items():
        if key in keys:
            values[key] = _typed(key, keys[key], kind)
    bases = {float(_typed(key, keys[key], float)) for key in _BASES if keys.get(key) is not None}
    if len(bases) > 1:
        raise _refuse("rotary_base", bases, "differs from rope_theta", "keep one of them")
    if bases:
        values["rope_theta"] = bases.pop()

    used = {*_SIZES.values(), *_OPTIONAL, *_BASES, MOE}
    notes = _check_rest(keys, "", used, _ONLY) + _check_rest(
        moe, f"{MOE}.", set(_MOE_SIZES.values()), _MOE_ONLY
    )
    heads = values["num_attention_heads"]
    for key in ("num_key_value_heads", "num_kv_heads"):
        if keys.get(key, heads) not in (heads, None):
            raise _refuse(
                key, keys[key], f"must be {heads}, one for each head", "use that model's code"
            )
    names = keys.get("architectures") or ["YuanForCausalLM"]
    if "YuanForCausalLM" not in names:
        raise _refuse("architectures", names, "must name YuanForCausalLM", "use that model's code")
    try:
        # As trained: angles rounded as Megatron did, packed documents in each other's sight unless
        # the file says that they were kept apart, as it does for models of ours.
        is_apart = keys.get("reset_attention_mask") is True
        model = ModelConfig(rope_mode=RopeMode.megatron, isolate_documents=is_apart, **values)
    except RecipeError as error:
        raise CheckpointError(f"{FILE}: {error}") from None
    if num_published(model) > MAX_TENSORS:
        layers = f"num_hidden_layers={model.num_hidden_layers}"
        rule = f"makes over {MAX_TENSORS} tensors with {layers}"
        raise _refuse("moe_num_experts", model.num_experts, rule, "use the published file")
    return Parsed(model, _carried(keys, used | _ONLY.keys() | _CARRIED.keys()), notes)


def render(model: ModelConfig, carried: dict[str, Any] | None, **ids: Any) -> dict[str, Any]:
    """The keys of a config.json for `model`.

    They are the `carried` ones as they came, or for a model of ours those that the published code
    reads, with the tokenizer's `ids`; and in their places the model's own numbers.
    """
    keys = dict(carried) if carried is not None else _fresh(model, ids)
    _put(keys, {key: getattr(model, ours) for ours, key in _SIZES.items()})
    _put(keys, {key: getattr(model, key) for key in _OPTIONAL})
    keys[MOE] = dict(keys[MOE])
    _put(keys[MOE], {key: getattr(model, ours) for ours, key in _MOE_SIZES.items()})
    bases = [key for key in _BASES if keys.get(key) is not None]
    if bases or model.rope_theta != 10_000:
        _put(keys, {key: model.rope_theta for key in bases or _BASES[:1]})
    return keys


def with_dtype(keys: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`keys` for weights stored as `dtype`, under the old name and, where it is used, the new."""
    names = ["torch_dtype", *(["dtype"] if keys.get("dtype") is not None else [])]
    return keys | dict.fromkeys(names, str(dtype).removeprefix("torch."))


def _put(keys: dict[str, Any], values: dict[str, Any]) -> None:
    # An equal value stays as it was written: 10000 does not become 10000.0.
    keys.update(
        {key: value for key, value in values.items() if key not in keys or keys[key] != value}
    )


def _fresh(model: ModelConfig, ids: dict[str, Any]) -> dict[str, Any]:
    lengths = {
        "intermediate_size": model.moe_intermediate_size,
        "model_max_length": model.max_position_embeddings,
    }
    resets = ("reset_attention_mask", "reset_position_ids")
    return {**_DEFAULTS, **lengths, **ids, **dict.fromkeys(resets, model.isolate_documents)}


def _check_rest(
    keys: dict[str, Any], prefix: str, used: set[str], only: dict[str, tuple[Any, ...]]
) -> tuple[str, ...]:
    notes = []
    for key, value in keys.items():
        if key in used:
            continue
        if key in only:
            # `1 == True`, so the type must agree as well, but 1 may stand for 1.0.
            if not any(
                value == one and isinstance(value, bool) == isinstance(one, bool)
                for one in only[key]
            ):
                allowed = " or ".join(str(one).lower() for one in only[key])
                raise _refuse(
                    prefix + key, value, f"must be {allowed}", "ptm computes nothing else"
                )
        elif not prefix and key in _CARRIED:
            if value is not None:
                _typed(key, value, _CARRIED[key])
        else:
            notes.append(f"{FILE}: {prefix}{key[:40]!r} ignored" + _why(key))
    return tuple(notes)


def _why(key: str) -> str:
    return ": ptm runs no code of a model folder" if key == "auto_map" else ""


def _carried(keys: dict[str, Any], known: set[str]) -> dict[str, Any]:
    kept = {key: value for key, value in keys.items() if key in known}
    kept[MOE] = {k: v for k, v in keys[MOE].items() if k in _MOE_ONLY or k in _MOE_SIZES.values()}
    return kept


def _size(keys: dict[str, Any], key: str, prefix: str = "") -> int:
    value = keys.get(key)
    if type(value) is not int or not 1 <= value < 2**31:
        rule = "must be a whole number from 1 to 2147483647"
        raise _refuse(prefix + key, value, rule, "use the published file")
    return value


def _typed(key: str, value: Any, kind: type) -> Any:
    fits = type(value) is kind or (kind is float and type(value) is int)
    if isinstance(value, int):
        fits = fits and abs(value) < 2**31
    if isinstance(value, list):
        fits = fits and len(value) <= 16 and all(isinstance(v, str) for v in value)
    if not fits:
        raise _refuse(key, value, f"must be of type {kind.__name__}", "use the published file")
    return value


def _refuse(key: str, value: object, rule: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{FILE}: " + line(key, value, rule, remedy))
