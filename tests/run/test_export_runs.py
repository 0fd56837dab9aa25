"""`ptm export` of a trained run by the command line: any number of ranks, and bits by size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ptm.checkpoint.load_model import quantized_module_of
from ptm.checkpoint.open_model import open_model
from tests.support.runs import launch, words
from tests.support.texts import documents, write_jsonl


def total_bytes(export: Path) -> int:
    """Of all tensors, as the index says."""
    index = json.loads((export / "model.safetensors.index.json").read_text())
    return index["metadata"]["total_size"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_give_the_same_bytes_and_bits_fit_a_size(tmp_path: Path) -> None:
    """The run's experts lie on two ranks; its export is the same of one process and of two, and
    with `size` some linears have more bits, as many as fit."""
    text = write_jsonl(tmp_path / "a.jsonl", documents(400))
    run, cache = tmp_path / "run", tmp_path / "cache"
    trained = launch(2, words(run, text, engine__ep=2, train__steps=3), cache)
    assert trained.returncode == 0, trained.stderr

    def export(world: int, name: str, *more: str) -> Path:
        given = [str(run), f"out={tmp_path / name}", "group=32", "rows=8", *more]
        done = launch(world, given, cache, verb="export")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"{tmp_path / name}: ") == 1, done.stdout
        return tmp_path / name

    one, two = export(0, "one"), export(2, "two")
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    assert sum(name.endswith(".safetensors") for name in files) == 3
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name

    size = int(1.25 * total_bytes(one))
    mixed = export(0, "mixed", "bits=auto", f"size={size}")
    assert total_bytes(one) < total_bytes(mixed) <= size
    bits = {record["bits"] for record in json.loads((mixed / "layers.json").read_text())}
    assert bits == {4, 8}, bits
    assert (mixed / "bits.svg").read_text().startswith("<svg")
    opened = open_model(mixed)
    logits = quantized_module_of(opened, mixed)(torch.tensor([[3, 5, 7]]))
    assert logits.shape == (1, 3, 512) and bool(logits.isfinite().all())
