"""Contestants in turns: what is compared, what a failure leaves, and that nobody stays behind."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from ptm.bench import show
from ptm.bench.contestant import elements
from ptm.bench.engines import contestants
from ptm.bench.interleave import (
    Contestant,
    Result,
    Spread,
    chosen,
    join,
    last_words,
    run_rounds,
    spread,
)
from ptm.bench.wire import wire_row
from ptm.cli import VERBS
from ptm.common.errors import RecipeError
from ptm.jobs import StepBenchJob
from ptm.model.transformer import Transformer
from ptm.recipe import load_recipe
from ptm.verbs import recipe_words
from tests.support.processes import ptm
from tests.support.tiny import tiny_config

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def one(tokens: float, seconds: float, wire: int = 30) -> dict:
    return {
        "tokens": tokens,
        "seconds": seconds,
        "steps": 2,
        "cpu_s": 2 * seconds,
        "peak_bytes": 100,
        "wire_bytes": wire,
        "ledger_bytes": 30,
        "bound_bytes": 30,
        "least_bytes": 20,
        "loss": 1.0,
        "report": {},
        "version": "v",
    }


def test_spread_is_the_median_between_least_and_most() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(1.0, 2.0, 3.0)
    assert all(math.isnan(value) for value in spread([]))


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is twice as slow in the second round, for both alike.
    base = Result("fsdp", [one(100, 1.0), one(100, 2.0)])
    fast = Result("paged", [one(100, 0.5), one(100, 1.0)])
    rows = show.summary([base, fast, Result("x", error="no", version="1")], "fsdp")
    assert rows[1]["ratios"]["tokens_per_s"] == {"least": 2.0, "median": 2.0, "most": 2.0}
    assert rows[1]["values"]["wire_over_bound"]["median"] == 1.5
    assert rows[2] == {"name": "x", "version": "1", "error": "no"}
    assert json.dumps(rows)


def test_ratios_are_to_the_first_that_ran_where_the_base_did_not() -> None:
    ran, failed = Result("paged", [one(100, 1.0)]), Result("fsdp", error="no", version="1")
    assert show.base_of([Result("x", error="no"), ran, failed], "fsdp") == "paged"
    assert show.base_of([ran, Result("fsdp", [one(100, 1.0)])], "fsdp") == "fsdp"
    assert show.base_of([failed], "fsdp") == "fsdp"


def test_a_round_takes_the_slowest_rank_and_all_tokens() -> None:
    ranks = [one(10, 1.0), {**one(20, 3.0), "peak_bytes": 50}]
    found = join(ranks)
    assert (found["tokens"], found["seconds"], found["peak_bytes"]) == (30, 3.0, 100)
    assert (found["ledger_bytes"], found["wire_bytes"]) == (60, 30)


def test_wire_row_divides_by_steps() -> None:
    row = wire_row(Result("paged", [one(1, 1.0)], version="v"))
    assert (row["wire"], row["ledger"], row["least"]) == (15, 15, 10)
    assert (row["wire_over_ledger"], row["wire_over_least"]) == (1.0, 1.5)


def test_the_least_to_send() -> None:
    config = tiny_config(num_hidden_layers=3)
    model = Transformer(config, device="meta")
    whole = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert elements(config, 3, 1) == 2 * whole + 2 * block
    root = whole - 3 * block
    assert elements(config, 3, 2) == 2 * (2 * whole + 2 * block) - root - block
    assert elements(config, 2, 4) == 5 * whole
    assert elements(config, 1, 4) == 2 * whole


def test_words_reach_the_contestants() -> None:
    words = ["engines", "model.scale=debug", "train.lr=1e-3", "ranks=3", "rounds=2"]
    job = load_recipe(words, cls=StepBenchJob, positionals=("bench",))
    assert (job.bench, job.ranks, job.rounds) == ("engines", 3, 2)
    passed = recipe_words(job)
    for row in contestants(passed, Path("/out"), None):
        recipe = load_recipe(row.words)
        assert (recipe.model, recipe.train) == (job.model, job.train)
        assert recipe.engine.zero == 3
    kinds = {
        row.name: str(load_recipe(row.words).engine.kind) for row in contestants((), Path(), "")
    }
    assert kinds["fsdp stock"] == "fsdp" and kinds["deepspeed nvme"] == "deepspeed"


def test_the_first_word_chooses_the_keys() -> None:
    bench = VERBS["bench"]
    assert bench.told(["router"]).config == "ptm.jobs:BenchJob"
    assert bench.told(["wire", "ranks=2"]).positionals == ("bench",)


def test_a_contestant_that_fails_says_why_and_nobody_stays(tmp_path: Path) -> None:
    bad = Contestant("bad", ("model.scale=debug", "engine.kind=fsdp", "engine.ep=2"))
    (result,) = run_rounds(
        [bad], folder=tmp_path, ranks=2, num_rounds=1, steps=1, warmup=1, timeout_s=60
    )
    assert result.error is not None and "engine.kind=paged" in result.error
    assert result.version == f"torch {torch.__version__}"
    _until(lambda: not _running(tmp_path), 10)


@pytest.mark.slow
def test_only_chooses_and_refuses_what_is_not_there() -> None:
    rows = [Contestant(name, ()) for name in ("ptm", "ddp", "fsdp")]
    assert [row.name for row in chosen(rows, (), "ptm")] == ["ptm", "ddp", "fsdp"]
    assert [row.name for row in chosen(rows, ("fsdp",), "ptm")] == ["ptm", "fsdp"]
    with pytest.raises(
        RecipeError, match="only=foo: is no contestant of this bench; choose of ptm"
    ):
        chosen(rows, ("fsdp", "foo"), "ptm")


def test_a_rank_that_was_killed_is_told_from_one_that_failed(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    for code, told in ((-9, "memory is short"), (1, "ended with code 1 (")):
        log.write_text(f"Root Cause:\n  rank      : 0\n  exitcode  : {code} (pid: 7)\n=====\n")
        assert told in last_words(log)
    log.write_text("first\nlast\n\n")
    assert last_words(log) == "last"


@pytest.mark.slow
def test_a_bench_that_is_killed_leaves_no_ranks(tmp_path: Path) -> None:
    words = f"model.scale=debug ranks=2 rounds=1000 out={tmp_path / 'o'}".split()
    bench = subprocess.Popen([sys.executable, "-m", "ptm", "bench", "wire", *words], cwd=tmp_path)
    _until(lambda: list(tmp_path.glob("o/**/turn-0-1.json")), 120)
    bench.kill()
    bench.wait()
    _until(lambda: not _running(tmp_path), 45)  # torchrun gives its ranks 30


def _until(happened: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _running(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            found.append(process.pid)
    return found


@pytest.mark.parametrize("name", ["engines", "wire", "tiers"])
def test_help_lists_the_keys(name: str, tmp_path: Path) -> None:
    ended = ptm("bench", name, "--help", cwd=tmp_path)
    assert ended.code == 0 and "round_steps=" in ended.out and "engine.zero=" in ended.out


@pytest.mark.slow
def test_engines_side_by_side(tmp_path: Path) -> None:
    words = "model.scale=debug rounds=2 round_steps=1 warmup=2 out=o json=found.json"
    ended = ptm("bench", "engines", *words.split(), cwd=tmp_path, env=ONE_THREAD)
    assert ended.code == 0, ended.err
    rows = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    for name in ("paged", "fsdp", "fsdp stock", "deepspeed"):
        assert len(rows[name]["rounds"]) == 2, rows[name]
        assert rows[name]["loss"] == pytest.approx(rows["fsdp"]["loss"], rel=1e-2)
    assert "async_io" in rows["deepspeed nvme"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["kind=paged", "kind=fsdp", "ep=2"])
def test_a_step_sends_what_the_ledger_says(engine: str, tmp_path: Path) -> None:
    words = f"engine.{engine} model.scale=debug rounds=2 round_steps=2 warmup=1 json=w.json out=o"
    ended = ptm("bench", "wire", *words.split(), cwd=tmp_path, env=ONE_THREAD)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "w.json").read_text())
    (row,) = found["rows"]
    assert row["ledger_over_bound"] == pytest.approx(1.0, abs=1e-3)
    if found["is_isolated"]:
        assert 1.0 <= row["wire_over_ledger"] < 1.03
        assert row["wire_over_least"] < 1.03
