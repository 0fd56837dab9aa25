"""Names and layouts against the published tables."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptm.common.errors import CheckpointError
from ptm.model.config import ModelConfig, RouterKind, num_parameters
from ptm.model.hf_names import (
    HEAD,
    Layout,
    Rows,
    imported,
    layout_of,
    num_published,
    our_shapes,
    published,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "m32_a"
SMALL = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    attention_projection_size=32,
    num_experts=4,
    moe_intermediate_size=8,
)


def take(tensors: dict[str, torch.Tensor], rows: Rows) -> torch.Tensor:
    parts = [tensors[p.name][p.start : p.stop].reshape(-1) for p in rows.pieces]
    return torch.cat(parts).reshape(rows.shape)


def test_the_published_model_has_1875_tensors_and_40_billion_elements() -> None:
    m32 = ModelConfig()
    shapes = {name: rows.shape for name, rows in published(m32, Layout.hf, tied_copy=True).items()}
    assert len(shapes) == num_published(m32) == 1875
    layer = [name for name in shapes if name.startswith("model.layers.7.")]
    assert len(layer) == 78
    assert shapes["model.layers.7.self_attn.q_proj.weight"] == (4096, 2048)
    assert shapes["model.layers.7.self_attn.lf_gate.conv1.weight"] == (1024, 2048, 2, 1)
    assert shapes["model.layers.7.mlp.experts.31.w1.weight"] == (16384, 2048)
    assert shapes["model.layers.7.mlp.experts.31.w2.weight"] == (2048, 8192)
    assert shapes[HEAD] == shapes["model.embed_tokens.weight"] == (135040, 2048)
    assert sum(map(math.prod, our_shapes(m32).values())) == num_parameters(m32) == 39_942_842_368


def test_hf2_shapes_of_the_published_model() -> None:
    shapes = {n: r.shape for n, r in published(ModelConfig(), Layout.hf2, tied_copy=True).items()}
    assert shapes["model.layers.0.self_attn.get_query_key.weight"] == (8192, 2048)
    assert shapes["model.layers.0.mlp.router.query_key_value.weight"] == (96, 2048)
    assert shapes["model.layers.23.mlp.experts.w1.31.weight"] == (16384, 2048)
    assert shapes["model.layers.23.mlp.experts.w2.0.weight"] == (2048, 8192)
    assert not any("q_proj" in name or "gate.query" in name for name in shapes)
    assert len(shapes) == 1875 - 24 * 3  # q and k are one, the router's three are one


def test_names_of_the_golden_folder() -> None:
    golden = load_file(GOLDEN / "model.safetensors")
    config = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_projection_size=128,
        num_experts=8,
        moe_intermediate_size=256,
    )
    wanted = {n: r.shape for n, r in published(config, Layout.hf, tied_copy=True).items()}
    assert wanted == {name: tuple(tensor.shape) for name, tensor in golden.items()}
    assert layout_of(list(golden)) is Layout.hf


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("layout", list(Layout))
def test_there_and_back(layout: Layout, is_tied: bool) -> None:
    config = ModelConfig(
        **{name: getattr(SMALL, name) for name in SMALL.__slots__}
        | {"tie_word_embeddings": is_tied}
    )
    ours = {n: torch.rand(shape) for n, shape in our_shapes(config).items()}
    theirs = {n: take(ours, r) for n, r in published(config, layout, tied_copy=True).items()}
    again = {name: take(theirs, rows) for name, rows in imported(config, layout).items()}
    assert layout_of(list(theirs)) is layout
    assert list(again) == list(ours)
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    assert torch.equal(theirs[HEAD], ours["model.embed_tokens.weight" if is_tied else HEAD])


def test_what_lies_where() -> None:
    ours = {n: torch.rand(shape) for n, shape in our_shapes(SMALL).items()}
    hf = {n: take(ours, r) for n, r in published(SMALL, Layout.hf, tied_copy=False).items()}
    hf2 = {n: take(ours, r) for n, r in published(SMALL, Layout.hf2, tied_copy=False).items()}
    at = "model.layers.1."
    halves = hf2[at + "self_attn.get_query_key.weight"].chunk(2)
    assert torch.equal(halves[0], hf[at + "self_attn.q_proj.weight"])
    assert torch.equal(halves[1], hf[at + "self_attn.k_proj.weight"])
    thirds = hf2[at + "mlp.router.query_key_value.weight"].chunk(3)
    for third, name in zip(thirds, ("query", "key", "value")):
        assert torch.equal(third, hf[at + f"mlp.gate.{name}.weight"])
    for e in range(4):
        for w in ("w1", "w2"):
            expert = ours[at + f"mlp.experts.{w}"][e]
            assert torch.equal(hf[at + f"mlp.experts.{e}.{w}.weight"], expert)
            assert torch.equal(hf2[at + f"mlp.experts.{w}.{e}.weight"], expert)
    assert HEAD not in hf


@pytest.mark.parametrize("router", [RouterKind.linear, RouterKind.shared_expert])
def test_only_the_attention_router_was_published(router: RouterKind) -> None:
    with pytest.raises(CheckpointError, match=f"model.router={router}: has no published form"):
        our_shapes(ModelConfig(router=router))
