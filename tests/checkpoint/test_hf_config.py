"""config.json: what is read, what is carried, what is refused, and that it comes back as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ptm.checkpoint.hf_config import parse, render
from ptm.checkpoint.untrusted import read_json
from ptm.common.errors import CheckpointError
from ptm.model.config import ModelConfig, RopeMode

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "m32_a" / "config.json").read_text())
DROP = object()


def changed(key: str, value: Any) -> dict[str, Any]:
    keys = copy.deepcopy(GOLDEN)
    *path, last = key.split(".")
    place = keys[path[0]] if path else keys
    if value is DROP:
        del place[last]
    else:
        place[last] = value
    return keys


def test_golden() -> None:
    parsed = parse(GOLDEN)
    assert parsed.notes == () and parsed.carried == GOLDEN
    assert parsed.model == ModelConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_projection_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        max_position_embeddings=128,
        rope_mode=RopeMode.megatron,
        isolate_documents=False,
    )
    assert json.dumps(render(parsed.model, parsed.carried)) == json.dumps(GOLDEN)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_base", 40890),
        ("rotary_base", 10000),
        ("rope_theta", 40890.0),
        ("num_hidden_layers", 4),
        ("rms_norm_eps", 1e-5),
        ("tie_word_embeddings", False),
        ("moe_config.moe_num_experts", 32),
        ("sep_token", None),
        ("transformers_version", "4.40.2"),
    ],
)
def test_other_numbers_come_back_as_written(key: str, value: Any) -> None:
    keys = changed(key, value)
    parsed = parse(keys)
    assert parsed.notes == ()
    assert json.dumps(render(parsed.model, parsed.carried)) == json.dumps(keys)


@pytest.mark.parametrize("key", ["rotary_base", "rope_theta"])
def test_rotary_base(key: str) -> None:
    assert parse(changed(key, 40890)).model.rope_theta == 40890.0
    assert parse(changed(key, None)).model.rope_theta == 10000.0


def test_tied_unless_it_says_otherwise() -> None:
    assert parse(changed("tie_word_embeddings", DROP)).model.tie_word_embeddings is True


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModelForCausalLM": "evil--modeling.Model"}),
        ("_name_or_path", "/home/someone"),
        ("moe_config.colour", "red"),
        ("esc\x1b[2J\nape", 1),
    ],
)
def test_other_keys_are_ignored_with_a_note_and_not_carried(key: str, value: Any) -> None:
    parsed = parse(changed(key, value))
    assert len(parsed.notes) == 1 and parsed.notes[0].isprintable()
    assert parsed.carried == GOLDEN and parsed.model == parse(GOLDEN).model
    assert ("no code" in parsed.notes[0]) == (key == "auto_map")


REFUSED = [
    ("trust_remote_code", True),
    ("_attn_implementation_internal", "kernels-community/evil"),
    ("num_attention_heads", DROP),
    ("attention_projection_size", DROP),
    ("vocab_size", "512"),
    ("vocab_size", 512.0),
    ("vocab_size", True),
    ("vocab_size", None),
    ("vocab_size", 0),
    ("vocab_size", -5),
    ("hidden_size", 10**30),
    ("hidden_size", 2**31),
    ("hidden_size", 63),
    ("hidden_size", [64]),
    ("num_hidden_layers", 2**31 - 1),
    ("num_hidden_layers", 100_000),
    ("num_attention_heads", 3),
    ("attention_projection_size", 32),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", True),
    ("tie_word_embeddings", "false"),
    ("tie_word_embeddings", 1),
    ("rotary_base", 0.5),
    ("rotary_base", [10000]),
    ("model_type", "llama"),
    ("model_type", ["yuan"]),
    ("architectures", ["LlamaForCausalLM"]),
    ("architectures", "YuanForCausalLM"),
    ("architectures", ["YuanForCausalLM"] * 99),
    ("hidden_act", "gelu"),
    ("use_moe", False),
    ("use_moe", 1),
    ("causal_mask", False),
    ("use_bias", True),
    ("use_yarn", True),
    ("rope_scaling", {"type": "linear", "factor": 4.0}),
    ("rotary_percent", 0.25),
    ("quantization_config", {"bits": 4}),
    ("num_key_value_heads", 2),
    ("use_cache", "yes"),
    ("eod_token", "5"),
    ("eod_token", 2**40),
    ("torch_dtype", 32),
    ("moe_config", DROP),
    ("moe_config", []),
    ("moe_config.moe_num_experts", DROP),
    ("moe_config.moe_num_experts", 10**6),
    ("moe_config.moe_top_k", 9),
    ("moe_config.moe_top_k", 0),
    ("moe_config.ffn_hidden_size", 1.5),
    ("moe_config.norm_topk_prob", False),
    ("moe_config.gated_linear_unit", False),
    ("moe_config.per_layer_experts_blocks", [8, 8, 4]),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=[f"{k}={v!s:.20}" for k, v in REFUSED])
def test_refuses(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(changed(key, value))
    message = str(caught.value)
    assert message.startswith("config.json: ") and "\n" not in message
    ours = {"rotary_base": "rope_theta", "moe_config.moe_top_k": "num_experts_per_tok"}
    assert key.split(".")[-1] in message or ours[key] in message


def test_two_rotary_bases_that_disagree_are_refused() -> None:
    with pytest.raises(CheckpointError, match="differs from rope_theta"):
        parse(changed("rotary_base", 40890) | {"rope_theta": 10000})


RAW = {
    "NaN": b'{"vocab_size": NaN}',
    "infinite": b'{"rms_norm_eps": 1e999}',
    "duplicate": b'{"use_moe": true, "use_moe": false}',
    "deep": b'{"a":' * 200_000,
    "deep lists": b'{"a":' + b"[" * 500_000,
    "long number": b'{"a":' + b"9" * 100_000 + b"}",
    "over a MiB": b'{"a":"' + b"x" * 2**20 + b'"}',
    "not UTF-8": b'{"a":"\xff"}',
    "BOM": b"\xef\xbb\xbf{}",
    "a list": b"[]",
    "empty": b"",
    "a pickle": b"\x80\x04}.",
    "two objects": b"{}{}",
}


@pytest.mark.parametrize("case", RAW)
def test_refuses_bytes(tmp_path: Path, case: str) -> None:
    (tmp_path / "config.json").write_bytes(RAW[case])
    with pytest.raises(CheckpointError, match="config.json") as caught:
        read_json(tmp_path, "config.json")
    assert str(caught.value).isprintable()


def test_a_model_of_ours_has_every_key_that_the_published_code_reads() -> None:
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "eod_token"), 3)
    model = ModelConfig(vocab_size=1024, hidden_size=64, num_attention_heads=2, rope_theta=40890.0)
    keys = render(model, None, sep_token=4, **ids)
    assert keys.keys() >= GOLDEN.keys() - {"torch_dtype"}  # known when the weights are
    assert keys["moe_config"].keys() == GOLDEN["moe_config"].keys()
    assert keys["rotary_base"] == 40890.0 and keys["eos_token_id"] == 3 and keys["sep_token"] == 4
    parsed = parse(keys)
    assert parsed.notes == ()
    assert parsed.model.rope_theta == 40890.0 and parsed.model.hidden_size == 64
