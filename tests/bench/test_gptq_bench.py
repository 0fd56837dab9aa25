"""`ptm bench gptq` on a tiny model: what it makes, measures and says of tools that are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptm.bench import gptq
from ptm.bench.gptq_measure import Reference
from ptm.bench.gptq_workload import HELD_OUT_ROWS, Size, read_tokens, write_workload
from ptm.checkpoint.hf import open_weights
from ptm.common.errors import RecipeError
from ptm.jobs import GptqBenchJob

TINY = Size(hidden=128, inner=256, layers=1, vocabulary=256, rows=4, length=64)


def test_the_workload_is_drawn_from_its_seed(tmp_path: Path) -> None:
    for name in "ab":
        write_workload(tmp_path / name, TINY)
    for file in ("model.safetensors", "tokens.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    calibration, held_out = read_tokens(tmp_path / "a")
    assert calibration.shape == (4, 64) and held_out.shape == (HELD_OUT_ROWS, 64)
    assert int(calibration.min()) >= 2 and int(calibration.max()) < 256
    weights = open_weights(tmp_path / "a")
    down = weights.read("model.layers.0.mlp.down_proj.weight").float()
    kurtosis = float(((down / down.std(1, keepdim=True)) ** 4).mean())
    assert kurtosis > 4, kurtosis  # 3 of a Gaussian
    assert weights.read("model.norm.weight").dtype is torch.bfloat16


@pytest.mark.slow
def test_ours_is_measured_and_missing_peers_are_named(tmp_path: Path) -> None:
    write_workload(tmp_path / "workload-4", TINY)
    numbers = tmp_path / "found.json"
    words = ["bench", "gptq", "rows=4", f"out={tmp_path}", f"json={numbers}"]
    first = subprocess.run([sys.executable, "-m", "ptm", *words], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    rows = {row["name"]: row for row in json.loads(numbers.read_text())["rows"]}
    ours, nearest = rows["ptm"], rows["nearest"]
    for key in ("output_error", "kl"):
        assert 0 < ours[key] < 0.6 * nearest[key], (key, ours, nearest)
    assert ours["cpu_s"] > 0 and ours["peak_bytes"] > 2**26
    for name, row in rows.items():
        if row.get("error", "").startswith("is not installed"):
            assert f"{name} (): is not installed; pip install" in first.stdout
    again = Reference(tmp_path / "workload-4").measure(Path(ours["folder"]))
    assert again.kl == pytest.approx(ours["kl"])


def test_an_interpreter_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    job = GptqBenchJob(bench="gptq", python=("/no/python",), out=str(tmp_path))
    with pytest.raises(RecipeError, match="python=/no/python: does not start"):
        gptq.run(job)
