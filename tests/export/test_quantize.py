"""`ptm export` of a small M32: bytes after a kill, starved experts, reading back, bad input."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptm.checkpoint.hf import Opened, open_hf
from ptm.checkpoint.load_model import load_model, module_of, quantized_module_of
from ptm.checkpoint.source import TensorInfo
from ptm.common.errors import CheckpointError, PtmError, RecipeError
from ptm.export import quantize
from ptm.export.calibrate import choose_rows
from ptm.export.card import starved
from ptm.export.config import (
    AS_IS,
    ConvertConfig,
    ExportConfig,
    ExportFormat,
    Fp6,
    Layers,
    Method,
    Target,
    Width,
)
from ptm.export.convert import convert
from ptm.export.layer import Layer, Record
from ptm.export.m32 import M32, linears_of
from ptm.export.quantize import export
from ptm.model.config import ModelConfig
from ptm.model.transformer import Transformer
from ptm.quant.grid import round_to_nearest

MODEL = ModelConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    attention_projection_size=128,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    vocab_size=256,
    max_position_embeddings=64,
    initializer_range=0.113,
)


class Weights:
    """A model's own tensors as a source."""

    def __init__(self, model: Transformer) -> None:
        self.tensors = {n: t for n, t in model.state_dict().items() if n != "expert_counts"}

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.tensors[name][start:stop].clone()


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    model = Transformer(MODEL)
    model.init_weights(seed=3)
    return Opened(MODEL, Weights(model), None, tmp_path / "none", (), tmp_path / "run")


def rows_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (count, 32), generator=g)
    return ids, torch.zeros_like(ids)


def run(
    opened: Opened, out: Path, advance=lambda name: None, rows=rows_of, **keys: object
) -> tuple[Path, list[Record]]:
    values: dict[str, object] = {"group": 32, "rows": 8, **keys}
    config = ExportConfig(run=str(opened.folder), out=str(out), **values)  # type: ignore[arg-type]
    return export(config, M32(opened), None if config.method is Method.nearest else rows, advance)


def test_a_grid_of_another_format_is_refused() -> None:
    with pytest.raises(RecipeError, match="fp6=e3m2: is a grid of format=fp6; add format=fp6"):
        ExportConfig(run="r", fp6=Fp6.e3m2)
    assert ExportConfig(run="r", format=ExportFormat.fp6, fp6=Fp6.e3m2).fp6 is Fp6.e3m2


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "keys",
    [
        {"format": ExportFormat.gptq},
        {"format": ExportFormat.gptq, "bits": "8", "symmetric": False},
        {"format": ExportFormat.compressed_tensors, "group": 0},
        {"format": ExportFormat.compressed_tensors, "symmetric": False},
        {"format": ExportFormat.fp6, "bits": "6"},
        {"format": ExportFormat.gptq, "layers": Layers.published},
    ],
    ids=str,
)
def test_export_reads_back_as_what_was_solved(opened: Opened, tmp_path: Path, keys: dict) -> None:
    solved = {}
    keep = Layer._keep

    def spy(self, name, codes, *more):
        solved[name] = codes
        keep(self, name, codes, *more)

    Layer._keep = spy
    try:
        out, records = run(opened, tmp_path / "out", **keys)
    finally:
        Layer._keep = keep
    again = open_hf(out)
    assert again.quantized is not None
    layers = keys.get("layers", Layers.default)
    assert set(again.quantized.modules) == set(linears_of(MODEL, layers)) == set(solved)
    assert len(records) == 2 * (4 + 2 * 8 + 3 * (layers is Layers.published))
    for name, codes in solved.items():
        found, order = again.quantized.quantized(name)
        assert order is None and torch.equal(found.codes_NK, codes.codes_NK)
        assert torch.equal(again.quantized.read(f"{name}.weight"), codes.dequantize())
    model = module_of(again, out)
    w1 = model.get_parameter("model.layers.1.mlp.experts.w1")
    assert torch.equal(w1[5], solved["model.layers.1.mlp.experts.5.w1"].dequantize())
    assert (
        model.config.isolate_documents and "| experts.w1 | 16 |" in (out / "README.md").read_text()
    )
    kept = torch.bfloat16
    norm = opened.weights.read("model.norm.weight")
    assert torch.equal(model.model.norm.weight, norm.to(kept).float())


def test_gptq_beats_rounding_on_its_text(opened: Opened, tmp_path: Path) -> None:
    _, records = run(opened, tmp_path / "a")
    assert all(r.error is not None and r.nearest is not None for r in records)
    pairs = [(r.error, r.nearest) for r in records if r.error and r.nearest]
    assert all(error < near for error, near in pairs)
    assert sum(e for e, _ in pairs) < 0.5 * sum(n for _, n in pairs)


def test_rounding_needs_no_text(opened: Opened, tmp_path: Path) -> None:
    out, records = run(opened, tmp_path / "a", method=Method.nearest)
    weight = opened.weights.read("model.layers.0.self_attn.q_proj.weight")
    grid = quantize.grid_of(ExportConfig(run="", group=32))
    found = open_hf(out).quantized
    assert found is not None and records[0].error is None
    near = round_to_nearest(weight, grid).dequantize()
    assert torch.equal(found.read("model.layers.0.self_attn.q_proj.weight"), near)


class Killed(Exception):
    pass


@pytest.mark.parametrize("when", [0, 1, 9, 25, 41])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_kill_at_any_layer_goes_on_to_the_same_bytes(
    opened: Opened, tmp_path: Path, when: int, alpha: float
) -> None:
    if alpha and when not in (25,):
        pytest.skip("one instant is enough for the twin's rows")
    whole, _ = run(opened, tmp_path / "whole", alpha=alpha)
    left = [when]

    def advance(name: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    with pytest.raises(Killed):
        run(opened, tmp_path / "out", advance, alpha=alpha)
    assert not (tmp_path / "out").exists()
    seen: list[str] = []
    out, _ = run(opened, tmp_path / "out", seen.append, alpha=alpha)
    assert files_of(out) == files_of(whole)
    assert (len([n for n in seen if "layers." in n]) == 20) == (when >= 22)
    assert not list(tmp_path.glob("*.partial"))


def test_what_was_begun_is_not_mixed_with_another_export(opened: Opened, tmp_path: Path) -> None:
    def advance(name: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(opened, tmp_path / "out", advance)
    with pytest.raises(CheckpointError, match=r"another export that was begun \(bits differ\)"):
        run(opened, tmp_path / "out", bits="8")
    out, _ = run(opened, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is there already"):
        run(opened, out)


def test_widths_are_chosen_once_and_kept_over_a_kill(opened: Opened, tmp_path: Path) -> None:
    """Measured anew they may come out otherwise; layers that are done have the first ones."""
    config = ExportConfig(
        run=str(opened.folder), out=str(tmp_path / "out"), group=32, rows=8, size="1MB"
    )
    names = list(M32(opened).linears(config.layers))
    mixed = [Width(4, 0), Width(4, 32), Width(8, 32), AS_IS]
    widths = {name: mixed[i % 4] for i, name in enumerate(names)}
    seen: list[str] = []

    def advance(name: str) -> None:
        seen.append(name)
        if name.startswith("model.layers.1.mlp.experts"):
            raise Killed

    def begin(choose, advance) -> Path:
        return export(config, M32(opened), rows_of, advance, choose)[0]

    with pytest.raises(Killed):
        begin(lambda: widths, advance)
    out = begin(lambda: pytest.fail("measured again"), lambda name: None)
    found = {
        r["name"]: (r["bits"], r["group"]) for r in json.loads((out / "layers.json").read_text())
    }
    assert found == {name: w for name, w in widths.items() if w != AS_IS}
    made = open_hf(out).quantized
    assert made is not None and set(made.modules) == set(found)
    for name, (bits, group) in found.items():
        grid = made.quantized(name)[0].grid
        assert (grid.bits, grid.group) == (bits, group)
    assert (out / "bits.svg").read_text().count("<title>") == len(names)
    assert not list(out.glob("settings*"))


def test_an_expert_that_nobody_chose_is_fitted_and_listed(opened: Opened, tmp_path: Path) -> None:
    """A router that never picks some: their scores are made hopeless."""
    names = [f"model.layers.{i}.mlp.gate.{p}.weight" for i in range(2) for p in ("query", "key")]
    for name in names:
        opened.weights.tensors[name].zero_()  # type: ignore[attr-defined]
    for i in range(2):  # even attention: every expert's score is the mean of values
        value = opened.weights.tensors[f"model.layers.{i}.mlp.gate.value.weight"]  # type: ignore
        value.zero_()
    out, records = run(opened, tmp_path / "out")
    few = starved(records)
    own = {r.name: r.own for r in records if r.name.endswith(".w1")}
    assert sorted(r.name for r in few) == sorted(n for n, count in own.items() if not count)
    assert len(few) == 12 and all(r.rows > 0 and r.own == 0 for r in few)
    card = (out / "README.md").read_text()
    assert "fitted with others' (12):" in card and "layers.0.mlp.experts.7: 0 of " in card
    for record in records:
        assert record.error is not None and record.nearest is not None
        assert record.error <= record.nearest
    model = load_model(out)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert bool(model.get_parameter("model.layers.0.mlp.experts.w1")[7].any())


def test_rows_are_added_for_experts_that_see_too_little() -> None:
    counts = torch.zeros(1, 6, 4, dtype=torch.int64)
    counts[0, :, 0] = 10
    counts[0, 3, 1] = 2
    counts[0, 4, 1] = 5
    counts[0, 5, 2] = 1
    assert choose_rows(counts, 2, 4) == [0, 1, 4, 5]  # 3 adds nothing after 4; expert 3 has none
    assert choose_rows(counts, 2, 0) == [0, 1]
    assert choose_rows(counts, 9, 4) == [0, 1, 2, 3, 4, 5]


def test_convert_reads_an_export_back(opened: Opened, tmp_path: Path) -> None:
    out, _ = run(opened, tmp_path / "out")
    convert(ConvertConfig(source=str(out), out=str(tmp_path / "ptm"), to=Target.ptm))
    a, b = load_model(out), load_model(tmp_path / "ptm")
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items()):
        assert torch.equal(x, y), name


def test_bad_sizes_are_one_line(opened: Opened, tmp_path: Path) -> None:
    for keys, match in (
        ({"group": 48}, r"group=48: must divide the \d+ inputs of .*; give 64"),
        ({"bits": "6"}, "bits=6: format=gptq has 4 or 8, or auto .*; give format=fp6"),
        ({"bits": "four"}, "bits=four: format=gptq has 4 or 8, or auto with a size; give bits=4"),
        ({"bits": "auto"}, "bits=auto: needs a size; give one, like size=23GB"),
        ({"bits": "4", "size": "1GB"}, "size=1GB: chooses among 4, 8 and 16 bits; give bits=auto"),
        ({"format": ExportFormat.fp6, "bits": "4"}, "bits=4: format=fp6 has 6; give bits=6"),
        ({"format": ExportFormat.fp6, "bits": "6", "symmetric": False}, "fp6 has no zero points"),
    ):
        with pytest.raises(RecipeError, match=match):
            run(opened, tmp_path / "out", **keys)  # type: ignore[arg-type]
    odd = dataclasses.replace(MODEL, num_experts=6)
    model = Transformer(odd)
    model.init_weights(seed=0)
    other = opened._replace(model=odd, weights=Weights(model))
    with pytest.raises(RecipeError, match="6 x 64, which 8 codes a word do not divide"):
        run(other, tmp_path / "out", layers=Layers.published)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda q: q.update(quant_method="awq"), "quant_method=awq: must be gptq"),
        (lambda q: q.update(bits=3), "bits=3: must be 4 or 8"),
        (
            lambda q: q.update(bits=8),
            r"bits=8: the shapes of model\.\S+ are those of 4 bits; set bits",
        ),
        (lambda q: q.update(group_size=0), "group_size=0: must be -1 or"),
        (lambda q: q.update(dynamic={"+:(a+)+$": {}}), "must be a plain regular expression"),
        (lambda q: q.update(checkpoint_format="marlin"), "checkpoint_format=marlin"),
    ],
)
def test_strange_quantization_configs_are_refused(
    opened: Opened, tmp_path: Path, change, match: str
) -> None:
    out, _ = run(opened, tmp_path / "out", method=Method.nearest)
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(PtmError) as error:
        load_model(out)
    text = str(error.value)
    assert re.search(match, text), text
    assert "\n" not in text


def test_what_a_config_says_of_zero_points_and_order_is_held_to(
    opened: Opened, tmp_path: Path
) -> None:
    out, _ = run(opened, tmp_path / "asymmetric", method=Method.nearest, symmetric=False)
    says(out, sym=True)
    (out / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"^tensor=model\.\S+: .* \(sym=true, and zero"):
        load_model(out)
    out, _ = run(opened, tmp_path / "scattered", method=Method.nearest)
    shard = next(iter(sorted(out.glob("*00002-of-*.safetensors"))))
    tensors = load_file(shard)
    tensors |= {name: t.flip(0) for name, t in tensors.items() if name.endswith(".g_idx")}
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"\(desc_act=false, and g_idx scatters"):
        load_model(out)
    says(out, desc_act=True)
    with pytest.raises(CheckpointError, match="^quantize_config.json: desc_act=false: quant"):
        load_model(out)
    (out / "quantize_config.json").unlink()
    load_model(out)
    says(out, desc_act="no")
    with pytest.raises(CheckpointError, match="desc_act=no: must be true or false"):
        load_model(out)


def says(export: Path, **changes: object) -> None:
    """Change what its config.json says of the quantization."""
    config = json.loads((export / "config.json").read_text())
    config["quantization_config"].update(changes)
    (export / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"group": 16, "format": ExportFormat.compressed_tensors},
        {"bits": "8", "symmetric": False},
        {"format": ExportFormat.fp6, "fp6": Fp6.e3m2},
    ],
    ids=str,
)
def test_packed_inference_is_that_of_the_dequantized_model(
    opened: Opened, tmp_path: Path, keys: dict
) -> None:
    out, _ = run(opened, tmp_path / "out", method=Method.nearest, **keys)
    again = open_hf(out)
    exact = module_of(again, out, dtype=torch.float32)
    rounded = module_of(again, out, dtype=torch.bfloat16)
    packed = quantized_module_of(again, out)
    size = sum(p.numel() for p in packed.parameters())
    assert size == sum(p.numel() for n, p in exact.named_parameters() if "experts" not in n
                       and "_proj" not in n)  # fmt: skip
    ids, _ = rows_of(4)
    with torch.no_grad():
        wanted, noise, found = (m(ids).float() for m in (exact, rounded, packed))
    # Of the middle row: one of another expert, at a tie of the router's, is another function.
    error, bound = (
        ((other - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() for other in (found, noise)
    )
    assert error < 1.5 * bound < 0.05
    a, b = (list(m.stream(ids[:2, :8], 6)) for m in (packed, rounded))
    assert len(a) == len(b) == 6
