"""Layers of ordinary models against transformers', number for number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.ordinary import KINDS, write_ordinary

from ptm.common.errors import CheckpointError
from ptm.export.config import ExportFormat
from ptm.export.ordinary import OrdinaryWalk
from ptm.export.ordinary_config import parse
from ptm.export.ordinary_layer import Layer, Twin, stages

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def finish(walk):
    """What a walk of stages returns."""
    try:
        while True:
            next(walk)
    except StopIteration as stop:
        return stop.value


def layers_of(walk: OrdinaryWalk) -> list[Layer]:
    return [Layer(walk.model, walk._source, i, torch.float32) for i in range(walk.num_layers)]


@pytest.mark.parametrize(
    "kind, keys",
    [
        *((kind, {}) for kind in KINDS),
        ("llama", {"attention_bias": True, "rope_parameters": LLAMA3}),
        ("llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5, "head_dim": 32}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen2_moe", {"mlp_only_layers": [1], "norm_topk_prob": True, "qkv_bias": False}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True}),
    ],
    ids=str,
)
def test_layers_are_those_of_transformers(tmp_path: Path, kind: str, keys: dict) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder = write_ordinary(tmp_path / "m", kind, **keys)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    walk = OrdinaryWalk(folder, ExportFormat.compressed_tensors)
    ids = torch.randint(0, 256, (3, 50), generator=torch.Generator().manual_seed(0))
    rows = [theirs.model.embed_tokens(batch).detach() for batch in ids.split(2)]
    for layer in layers_of(walk):
        rows = finish(stages(layer, rows)).rows
    with torch.no_grad():
        wanted = theirs(ids).logits
        found = theirs.lm_head(theirs.model.norm(torch.cat(rows)))
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_is_read_once_and_by_what_feeds_it(tmp_path: Path, kind: str) -> None:
    """Stages have each linear's input: W x of them, put together, is the layer's output."""
    walk = OrdinaryWalk(write_ordinary(tmp_path / "m", kind), ExportFormat.gptq)
    layer = layers_of(walk)[0]
    x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1))
    seen = [name for stage in stages(layer, [x.clone()]) for name in stage.linears]
    assert sorted(seen) == sorted(walk.model.linears(0))
    alike = finish(stages(layer, [x.clone()], twin=Twin(layers_of(walk)[0], [x.clone()])))
    assert torch.equal(alike.rows[0], alike.twin_rows[0])
    loud = finish(stages(layer, [x.clone()], least_rows=1000))
    assert torch.equal(loud.rows[0], alike.rows[0]), "shown tokens of others change no output"
    whole = x + layer.linear("self_attn.o_proj", layer.attend(layer.normed("input", x)))
    whole = whole + layer.mlp(layer.normed("post_attention", whole))
    torch.testing.assert_close(whole, alike.rows[0], rtol=0, atol=1e-5)


def test_starved_experts_are_shown_tokens_of_others(tmp_path: Path) -> None:
    walk = OrdinaryWalk(write_ordinary(tmp_path / "m", "qwen3_moe"), ExportFormat.gptq)
    layer = layers_of(walk)[0]
    layer.weights["mlp.gate.weight"].zero_()
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(2))
    own = {}
    for stage in stages(layer, [x], least_rows=16):
        for name in stage.linears:
            if ".experts." in name:
                own[name] = (stage.own_rows, len(stage.inputs[0]))
    assert set(own.values()) == {(40, 40), (0, 16)}


@pytest.mark.parametrize(
    "kind, keys, match",
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu: must be silu"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type=yarn: must be"),
        ("mixtral", {"sliding_window": 64}, "sliding_window=64: must be"),
        ("mixtral", {"num_local_experts": 10**9}, "num_local_experts=1000000000"),
        ("qwen3_moe", {"mlp_only_layers": "1"}, "mlp_only_layers=1: must be a list"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3: must divide the 4 heads"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)
def test_another_arithmetic_is_refused(kind: str, keys: dict, match: str) -> None:
    from support.ordinary import BASE, CONFIGS

    with pytest.raises(CheckpointError, match=match) as error:
        parse({**BASE, **CONFIGS[kind], **keys})
    assert "\n" not in str(error.value)
