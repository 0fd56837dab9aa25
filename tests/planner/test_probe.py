"""Measuring this machine: once, kept, and only when asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ptm.mesh.loopback import measure_loopback
from ptm.model.transformer import Transformer
from ptm.planner import job_time, probe
from ptm.planner.hardware import Hardware, detect
from ptm.planner.job import Job
from ptm.planner.speed import WORK
from tests.planner.test_memory import make_job


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PTM_CACHE", str(tmp_path))
    return tmp_path / "speed.json"


def here(job: Job, *, may_measure: bool, ssd_path: Path | None = None) -> Hardware:
    machine = detect(local_ranks=job.ranks, device="cpu")
    return probe.with_speed(machine, job, may_measure=may_measure, ssd_path=ssd_path)


def test_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("debug", "bf16", "none", ranks=2)
    assert here(job, may_measure=False).speed is None and not cache.exists()
    threads = torch.get_num_threads()
    speed = here(job, may_measure=True, ssd_path=cache.parent / "pages").speed
    assert torch.get_num_threads() == threads
    assert speed is not None and speed.timed is not None
    assert speed.timed.tokens == job.micro_tokens and speed.timed.block_forward_s > 0
    assert all(speed.rate(p, kind) > 1e8 for p in ("bf16", "fp32") for kind in WORK)
    assert 1e6 < speed.host_adam < 1e11 and 1e7 < speed.link < 1e12
    assert speed.ssd_read != 0.5e9  # the disk was measured too

    monkeypatch.setattr(probe, "_rates", None)  # would fail if called
    again = here(job, may_measure=True, ssd_path=cache.parent / "pages").speed
    assert again == speed
    other = here(make_job("heads", "bf16", "none"), may_measure=False).speed
    assert other is None or other.timed is None


@pytest.mark.parametrize("body", ["", "[]", "{", '{"x": 1}', "\x00"])
def test_a_bad_cache_is_as_good_as_none(cache: Path, body: str) -> None:
    cache.write_text(body)
    assert here(make_job("debug", "bf16", "none"), may_measure=False).speed is None


def test_large_jobs_are_planned_by_rates(cache: Path) -> None:
    from tests.planner.test_states import full

    job = full(1, device="cpu")
    slow = {"flops_per_s": {"bf16": dict.fromkeys(WORK, 1e11)}}
    assert job_time.time_job(job, slow) is None


def test_gradients_go_where_they_go_in_a_run() -> None:
    job = make_job("debug", "bf16", "none")
    model = Transformer(job.model, dtype=torch.bfloat16)
    model.init_weights(0)
    model.train()
    blocks, model.model.layers = model.model.layers, nn.ModuleList()
    rooms: dict[str, torch.Tensor] = {}
    for unit in (*blocks, model):
        job_time._take_gradients(unit, rooms)
    for room in rooms.values():
        room.fill_(torch.nan)
    ids = torch.randint(0, job.model.vocab_size, (job.micro_rows, job.seq_len + 1))
    assert all(seconds > 0 for seconds in job_time._once(model, blocks, ids))
    assert all(room.isfinite().all() for room in rooms.values())
    parameters = [*blocks.parameters(), *model.parameters()]
    assert all(parameter.grad is None for parameter in parameters)


def test_a_cache_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTM_CACHE", str(tmp_path / "file" / "below"))
    probe._save("machine", {"rates": {}})  # the next plan measures again
    assert probe._load("machine") == {}


def test_caches_are_json_by_machine(cache: Path) -> None:
    probe._save("one", {"rates": 1})
    probe._save("two", {"rates": 2})
    assert json.loads(cache.read_text()) == {"one": {"rates": 1}, "two": {"rates": 2}}
    assert list(cache.parent.iterdir()) == [cache]


def test_loopback() -> None:
    found = measure_loopback(2**20)
    assert found.bytes_per_s > 1e7 and 0 < found.latency_s < 0.1
