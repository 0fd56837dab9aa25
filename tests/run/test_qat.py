"""Quantization-aware training hands over to the export without losing a bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptm import build, verbs_export
from ptm.checkpoint.hf import open_hf
from ptm.common.errors import CheckpointError, RecipeError
from ptm.export.config import ExportConfig, ExportFormat
from ptm.quant import fake_quant
from ptm.recipe import load_recipe
from tests.support.texts import documents, write_jsonl

WORDS = [
    "recipe=m32_qat",
    "model.scale=debug",
    "model.num_experts=4",
    "train.steps=3",
    "engine.page_mib=1",
    "eval.rows=4",
    "log.wandb=off",
]


@pytest.mark.parametrize(
    "words, format",
    [
        (["qat.grid=int4"], ExportFormat.gptq),
        (["qat.grid=fp6_e2m3", "qat.group=0"], ExportFormat.fp6),
    ],
    ids=["int4", "fp6"],
)
def test_export_is_what_the_last_forward_saw(
    words: list[str], format: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", documents(800))
    seen: list[torch.Tensor] = []
    on_grid = fake_quant.on_grid

    def spy(w, grid):
        found = on_grid(w, grid)
        seen.append(found.dequantize())
        return found

    monkeypatch.setattr(fake_quant, "on_grid", spy)
    places = [f"data.source={text}", f"data.cache_dir={tmp_path}/c", f"run.dir={tmp_path}/run"]
    recipe = load_recipe([*WORDS, *words, *places])
    build.train(recipe)
    verbs_export.export(ExportConfig(run=str(tmp_path / "run"), format=format))
    bits = {"gptq": 4, "fp6": 6}[str(format)]
    exported = open_hf(tmp_path / "run" / "export" / f"{format}-{bits}").quantized
    assert exported is not None
    # The sample after the last step is one forward after another: q, k, v, o, w1, w2 per layer.
    last = seen[-12:]
    for layer in (0, 1):
        prefix = f"model.layers.{layer}."
        for name, near in zip("qkvo", last[6 * layer :]):
            found = exported.read(f"{prefix}self_attn.{name}_proj.weight")
            assert torch.equal(found, near), (layer, name)
        for matrix, near in zip(("w1", "w2"), last[6 * layer + 4 :]):
            names = [f"{prefix}mlp.experts.{e}.{matrix}.weight" for e in range(4)]
            assert torch.equal(torch.cat([exported.read(n) for n in names]), near), (layer, matrix)
    for _ in range(2):  # a failure leaves no process group behind
        with pytest.raises(CheckpointError, match="is there already"):
            verbs_export.export(ExportConfig(run=str(tmp_path / "run"), format=format))
    with pytest.raises(RecipeError, match="was trained on"):
        other = ExportFormat.gptq if format is ExportFormat.fp6 else ExportFormat.fp6
        bits = 4 if other is ExportFormat.gptq else 6
        verbs_export.export(ExportConfig(run=str(tmp_path / "run"), format=other, bits=str(bits)))


def test_bad_qat_settings_are_one_line(tmp_path: Path) -> None:
    for words, match in (
        (["qat.grid=int4", "engine.kind=fsdp"], "qat.grid=int4: engine.kind=fsdp does not keep"),
        (["qat.distill=0.5"], "qat.distill=0.5: has no teacher"),
        (["qat.grid=fp6_e3m2", "qat.symmetric=false"], "fp6 has no zero points"),
        (["qat.grid=int3"], "qat.grid=int3"),
    ):
        with pytest.raises(RecipeError, match=match):
            load_recipe(["recipe=m32", "model.scale=debug", *words])
    text = write_jsonl(tmp_path / "a.jsonl", documents(400))
    words = [*WORDS, "qat.group=48", f"data.source={text}", f"data.cache_dir={tmp_path}/c"]
    with pytest.raises(RecipeError, match="qat.group=48: must divide the 64 inputs"):
        build.train(load_recipe([*words, f"run.dir={tmp_path}/run"]))
