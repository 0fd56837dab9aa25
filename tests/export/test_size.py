"""`ptm plan export`: against real files, and against the published M32."""

from __future__ import annotations

import pytest
import torch

from ptm.export.config import ExportConfig, ExportFormat
from ptm.export.quantize import format_of, grid_of
from ptm.export.size import kinds_of, stored_bytes
from ptm.jobs import PlanExportJob
from ptm.quant.config import Layers
from ptm.quant.grid import round_to_nearest
from ptm.quant.pack import to_tensors
from ptm.recipe import load_recipe
from ptm.verbs import show_export

GIB = 2**30


@pytest.mark.parametrize("N, K", [(64, 128), (40, 96), (72, 64)])
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"bits": "8", "symmetric": False},
        {"format": ExportFormat.compressed_tensors, "symmetric": False},
        {"format": ExportFormat.fp6},
    ],
    ids=["gptq", "gptq-8", "compressed-tensors", "fp6"],
)
def test_counts_what_is_stored(N: int, K: int, group: int, keys: dict) -> None:
    config = ExportConfig(run="", group=group, **keys)
    grid = grid_of(config)
    tensors = to_tensors(round_to_nearest(torch.randn(N, K), grid), format_of(config))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored_bytes(N, K, grid, config.format) == size


@pytest.mark.parametrize("bits, published_gib", [(4, 20.0), (8, 38.5), (16, 74.4)])
def test_m32_is_as_large_as_published(bits: int, published_gib: float) -> None:
    model = load_recipe(["recipe=m32", "model.scale=full"]).model
    config = ExportConfig(run="", bits=str(min(bits, 8)), layers=Layers.published)
    kinds = kinds_of(model, config, is_16_bits=bits == 16)
    assert sum(k.num_bytes for k in kinds) == pytest.approx(published_gib * GIB, rel=0.02)
    quantized = [k for k in kinds if k.bits < 16]
    if bits < 16:
        assert sum(k.tensors for k in quantized) == 1704
        assert sum(k.parameters for k in quantized) == pytest.approx(39.46e9, rel=1e-3)


def test_prints_by_kind(capsys: pytest.CaptureFixture) -> None:
    show_export(PlanExportJob(action="export"))
    shown = capsys.readouterr().out
    for word in ("experts.w1", "gate.query", "filters", "norms", "embed_tokens", "all"):
        assert word in shown
