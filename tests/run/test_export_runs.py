"""`ptm export` of a run by the command line: any number of ranks, one killed, and bits by size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from ptm.checkpoint.load_model import quantized_module_of
from ptm.checkpoint.open_model import open_model
from tests.run.test_resume import ranks_of
from tests.support.runs import command, environment, launch, words
from tests.support.texts import documents, write_jsonl


def total_bytes(export: Path) -> int:
    """Of all tensors, as the index says."""
    index = json.loads((export / "model.safetensors.index.json").read_text())
    return index["metadata"]["total_size"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_give_the_same_bytes_and_bits_fit_a_size(tmp_path: Path) -> None:
    """The experts of one run lie on two ranks, those of another whole; exports of these weights are
    the same by 1, 2 and 4 ranks. With `size` some linears have more bits, as many as fit."""
    text = write_jsonl(tmp_path / "a.jsonl", documents(400))
    run, whole, cache = tmp_path / "run", tmp_path / "whole", tmp_path / "cache"
    trained = launch(2, words(run, text, engine__ep=2, train__steps=3), cache)
    assert trained.returncode == 0, trained.stderr
    still = {"train__init_from": run, "train__steps": 1, "train__lr": 1e-30}
    trained = launch(2, words(whole, text, train__warmup_steps=0, **still), cache)
    assert trained.returncode == 0, trained.stderr
    given = ["group=32", "rows=8", "micro_batch_size=1"]

    def export(world: int, name: str, *more: str, of: Path = run) -> Path:
        done = launch(
            world, [str(of), f"out={tmp_path / name}", *given, *more], cache, verb="export"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"{tmp_path / name}: ") == 1, done.stdout
        return tmp_path / name

    one = export(0, "one")
    wanted = {path.name: path.read_bytes() for path in one.iterdir()}
    assert sum(name.endswith(".safetensors") for name in wanted) == 3
    for world, of in ((2, run), (4, run), (1, whole), (2, whole)):
        found = export(world, f"{world}-{of.name}", of=of)
        assert {path.name: path.read_bytes() for path in found.iterdir()} == wanted, (world, of)

    killed = command(2, [str(run), f"out={tmp_path / 'two'}", *given], "export")
    with open(tmp_path / "said", "w") as said:
        agent = subprocess.Popen(
            killed, env=environment(cache), stdout=said, stderr=said, text=True
        )
        begun = tmp_path / "two.partial" / "rows-00001.safetensors"
        while not begun.exists() and agent.poll() is None:
            time.sleep(0.001)
        rank = ranks_of(agent)[1]
        os.kill(rank, signal.SIGKILL)
        assert agent.wait(timeout=60) == 128 + signal.SIGKILL
    lines = [row for row in (tmp_path / "said").read_text().splitlines() if "; " in row]
    assert lines.pop().startswith("signal=SIGKILL: rank 1 on "), lines
    told = ("a rank has left or is late", "stopped, layers that are done are kept")
    assert len(lines) <= 1 and all(any(text in row for text in told) for row in lines), lines
    assert not (tmp_path / "two").exists()
    two = export(2, "two")
    assert {path.name: path.read_bytes() for path in two.iterdir()} == wanted

    foreign = export(0, "foreign", f"source={text}", "format=compressed-tensors")
    assert total_bytes(foreign) > 0, "calibrated on text that is not the run's"

    size = int(1.25 * total_bytes(one))
    mixed = export(0, "mixed", "bits=auto", f"size={size}")
    assert total_bytes(one) < total_bytes(mixed) <= size
    bits = {record["bits"] for record in json.loads((mixed / "layers.json").read_text())}
    assert bits == {4, 8}, bits
    assert (mixed / "bits.svg").read_text().startswith("<svg")
    opened = open_model(mixed)
    logits = quantized_module_of(opened, mixed)(torch.tensor([[3, 5, 7]]))
    assert logits.shape == (1, 3, 512) and bool(logits.isfinite().all())
