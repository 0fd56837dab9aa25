"""`ptm plan export`: against real files, and against the published M32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ptm.checkpoint.hf import Opened
from ptm.common.errors import RecipeError
from ptm.export.allocate import fit, prior
from ptm.export.config import AS_IS, ExportConfig, ExportFormat, Method, Width
from ptm.export.layer import format_of
from ptm.export.m32 import M32, linears_of
from ptm.export.quantize import export, grid_of
from ptm.export.size import kinds_of, stored_bytes
from ptm.jobs import PlanExportJob
from ptm.model.transformer import Transformer
from ptm.quant.config import Layers
from ptm.quant.grid import round_to_nearest
from ptm.quant.pack import to_tensors
from ptm.recipe import load_recipe
from ptm.verbs import show_export
from tests.export.test_quantize import MODEL, Weights

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
    is_plain = dict.fromkeys(linears_of(model, config.layers), AS_IS) if bits == 16 else None
    kinds = kinds_of(model, config, is_plain)
    assert sum(k.num_bytes for k in kinds) == pytest.approx(published_gib * GIB, rel=0.02)
    quantized = [k for k in kinds if k.width != AS_IS]
    if bits < 16:
        assert sum(k.tensors for k in quantized) == 1704
        assert sum(k.parameters for k in quantized) == pytest.approx(39.46e9, rel=1e-3)


def planned(capsys: pytest.CaptureFixture, **keys: Any) -> dict[tuple[str, str], tuple[int, str]]:
    """Of what is printed: (kind, bits / group) -> tensors and size."""
    show_export(PlanExportJob(action="export", **keys))
    rows = [row.split("│")[1:-1] for row in capsys.readouterr().out.splitlines() if "│" in row]
    words = [[word.strip() for word in row] for row in rows]
    return {(w[0], w[3]): (int(w[1].replace(",", "")), w[4]) for w in words}


@pytest.mark.parametrize("gib", [20.1, 23.27, 40.0, 74.0])
def test_a_plan_fits_its_size(capsys: pytest.CaptureFixture, gib: float) -> None:
    given = {"bits": "auto"} if gib < 30 else {}
    found = planned(capsys, size=f"{gib}GiB", **given)
    number, unit = next(size for (kind, _), (_, size) in found.items() if kind == "all").split()
    assert unit == "GiB" and gib - 0.05 <= float(number) <= gib  # an expert more
    experts = {width: count for (kind, width), (count, _) in found.items() if kind == "experts.w2"}
    assert sum(experts.values()) == 768
    if gib == 23.27:  # what every token goes through first, experts with what is left
        assert not [w for k, w in found if k in ("q_proj", "gate.query") and w.startswith("4/")]
        assert experts.keys() | {w for k, w in found if k == "experts.w1"} >= {"4/32", "8/128"}


@pytest.mark.parametrize("size", ["20GB", "90GB"])
def test_sizes_that_cannot_be_are_told_which_can(size: str) -> None:
    ends = r"19\.33 GiB: all at 4 bits, a scale a row\) to less than \d+ \(74\.40 GiB: none"
    rule = rf"size={size}: .*{ends} quantized\); give"
    with pytest.raises(RecipeError, match=rule):
        show_export(PlanExportJob(action="export", size=size))
    with pytest.raises(RecipeError, match="bits=16: format=gptq has 4 or 8, or auto"):
        show_export(PlanExportJob(action="export", size="30GB", bits="16"))


@pytest.mark.parametrize("part", [0.0, 0.3, 0.8, 0.999])
@pytest.mark.parametrize("format", [ExportFormat.gptq, ExportFormat.compressed_tensors])
def test_a_planned_export_has_the_planned_size(
    tmp_path: Path, part: float, format: ExportFormat
) -> None:
    config = ExportConfig(
        run="", out=str(tmp_path / "out"), group=32, format=format, method=Method.nearest,
        layers=Layers.published if format is not ExportFormat.gptq else Layers.default,
    )  # fmt: skip
    linears = linears_of(MODEL, config.layers)
    costs = prior(linears, {w: grid_of(config, width=w) for w in config.widths}, format)
    ends = [
        sum(k.num_bytes for k in kinds_of(MODEL, config, dict.fromkeys(linears, width)))
        for width in (Width(4, 0), AS_IS)
    ]
    rest = ends[1] - sum(c.size[AS_IS] for c in costs.values())
    size = int(ends[0] + part * (ends[1] - ends[0]))
    widths = fit(str(size), rest, costs)
    kinds = kinds_of(MODEL, config, widths)
    model = Transformer(MODEL)
    model.init_weights(seed=3)
    walk = M32(Opened(MODEL, Weights(model), None, Path("none"), (), Path("none")))
    out, _ = export(config, walk, None, lambda name: None, lambda: widths)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(kind.num_bytes for kind in kinds)
    assert size - 2 * 64 * 128 <= sum(kind.num_bytes for kind in kinds) <= size
    if not part:
        assert set(widths.values()) == {Width(4, 0)}
    with pytest.raises(RecipeError, match="none quantized"):
        fit(str(ends[1]), rest, costs)


def test_prints_by_kind(capsys: pytest.CaptureFixture) -> None:
    show_export(PlanExportJob(action="export"))
    shown = capsys.readouterr().out
    for word in ("experts.w1", "gate.query", "filters", "norms", "embed_tokens", "all", "4/128"):
        assert word in shown
    assert "m32, scale full: gptq, 4 bits, symmetric=true" in shown
    show_export(PlanExportJob(action="export", group=0, format=ExportFormat.fp6, bits="6"))
    assert "6/row" in capsys.readouterr().out
