"""`ptm bench kernels`: its numbers, its chart, and what it refuses."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from ptm import cli, verbs
from ptm.bench import gptq, kernel_lfa, kernel_moe, kernel_products, kernels
from ptm.bench.kernel_case import Case
from ptm.common.errors import RecipeError, StorageError
from ptm.jobs import KernelBenchJob
from ptm.kernels import native
from tests.support.native import needs_library


def small() -> list[Case]:
    x = torch.linspace(0, 1, 1000)
    runs = {"twice": lambda: [x * 2], "rounded": lambda: [(x * 2).bfloat16()]}
    return [Case("rope_qk", "a thousand", runs, lambda: [x.double() * 2], bytes=8000, flops=1000)]


@needs_library
def test_numbers_table_and_chart(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(kernels.CASES, "rope_qk", small)
    monkeypatch.setattr(kernels, "WARM_S", 0.0)
    out, chart = tmp_path / "k.json", tmp_path / "k.svg"
    kernels.run(
        KernelBenchJob(bench="kernels", op=("rope_qk",), rounds=3, json=str(out), svg=str(chart))
    )
    found = json.loads(out.read_text())
    assert found["isa"] == native.isa() and found["flops_per_s"] > 1e8
    (case,) = found["cases"]
    ours, rounded = case["rows"]
    assert ours["ratio_least"] == ours["ratio_median"] == 1.0 and ours["error"] < 1e-7
    assert 1e-4 < rounded["error"] < 4e-3
    assert rounded["ratio_least"] == rounded["least_s"] / ours["least_s"]
    assert ours["of_bytes"] == 8000 / ours["least_s"] / case["bytes_per_s"]
    assert "rope_qk: a thousand" in capsys.readouterr().out
    bars = ElementTree.parse(chart).getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 3  # the ground and two bars


@needs_library
def test_refuses_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="op=ropes: must be one of add_rmsnorm, "):
        kernels.run(KernelBenchJob(bench="kernels", op=("ropes",)))
    with native.forced(None), pytest.raises(RecipeError, match="no compiled kernel to measure"):
        kernels.run(KernelBenchJob(bench="kernels"))
    monkeypatch.setitem(kernels.CASES, "rope_qk", small)
    job = KernelBenchJob(bench="kernels", op=("rope_qk",), rounds=1, json=str(tmp_path))
    with pytest.raises(StorageError, match="file=.*cannot be written"):
        kernels.run(job)


@pytest.mark.parametrize("key", ["out", "json", "svg"])
@pytest.mark.parametrize("bench", ["kernels", "updates", "wire", "gptq"])
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    bench, key, tmp_path, monkeypatch, capsys
):
    for benches in (verbs.BENCHES, verbs.STEP_BENCHES):
        monkeypatch.setitem(benches, bench, lambda *_: print("measured"))
    for module in (kernels, gptq):
        monkeypatch.setattr(module, "run", lambda job: print("measured"))
    (tmp_path / "file").touch()
    given = [bench, f"out={tmp_path}/runs", f"json={tmp_path}/a.json", f"svg={tmp_path}/a.svg"]
    keys = {f.name for f in dataclasses.fields(cli.load(cli.VERBS["bench"].told([bench]).config))}
    if key not in keys:
        return
    words = [word for word in given if word == bench or word.partition("=")[0] in keys]
    assert cli.run(["bench", *words]) == 0
    assert "measured" in capsys.readouterr().out and not list(tmp_path.glob("a.*"))
    bad = f"{key}={tmp_path}/file/x"
    assert cli.run(["bench", *(w for w in words if not w.startswith(f"{key}=")), bad]) == 74
    shown = capsys.readouterr()
    assert "measured" not in shown.out and shown.err.startswith(f"{key}={tmp_path}"[:60])
    assert shown.err.endswith(": cannot be written (Not a directory); name another\n")


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("op", sorted(kernels.CASES))
def test_the_contestants_of_every_op_agree_with_fp64(op, monkeypatch):
    # As large, torch takes 12 minutes for the heads where the CPU has no products of bf16.
    monkeypatch.setattr(kernel_products, "HEADS", [(256, 256, 2048)])
    monkeypatch.setattr(kernel_moe, "SHAPES", [(512, 256, 512, 32, 2)])
    monkeypatch.setattr(kernel_lfa, "SHAPES", [(2, 150, 256)])
    for case in kernels.CASES[op]():
        exact = case.exact()
        for name, run in case.contestants.items():
            assert kernels._error(run(), exact) < 0.02, (case.what, name)
