"""Seconds and bytes of a step in closed form: against the ledger of a real step, and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptm.model.config import flops_per_token
from ptm.planner.job import Job
from ptm.planner.step_time import flops, wire_of
from tests.planner.test_memory import make, make_job, train
from tests.planner.test_states import full
from tests.support.mesh import mesh_of_test
from tests.support.ranks import run_ranks


def sent(rank: int, world: int, job: Job) -> dict[str, int]:
    """What the ledger counted in two steps, less what it counted in one."""
    mesh = mesh_of_test(rank, world, job.ep)
    engine = make(job, mesh)
    counted = []
    for _ in range(2):
        train(engine, job, job.micro_batches)
        counted.append({name: e.sent_bytes for name, e in mesh.ledger.entries.items()})
    engine.close()
    return {name: counted[1][name] - counted[0].get(name, 0) for name in counted[1]}


@pytest.mark.parametrize(
    "zero, ep, recompute, micro_batches",
    [
        (1, 1, "none", 1),
        (2, 1, "none", 3),
        (3, 1, "block", 2),
        (3, 2, "none", 2),
        (2, 2, "block", 1),
    ],
)
def test_bytes_are_the_ledgers(zero: int, ep: int, recompute: str, micro_batches: int) -> None:
    job = make_job("layers", "bf16", recompute, ranks=2, ep=ep, zero=zero)
    job = replace(job, batch_tokens=job.batch_tokens * micro_batches)
    assert job.micro_batches == micro_batches
    found = run_ranks(2, sent, job)
    wire = wire_of(job)

    def mean(name: str) -> float:
        return sum(rank.get(name, 0) for rank in found) / 2

    assert wire.gather_bytes == pytest.approx(mean("gather"), rel=0.01)
    assert wire.sum_bytes == pytest.approx(mean("scatter_sum"), rel=0.01)
    if ep > 1:  # tokens go where the router sends them
        assert wire.expert_bytes == pytest.approx(mean("all_to_all"), rel=0.25)


def test_flops_are_the_models() -> None:
    job = full(8)
    per_token = 3 * sum(flops(job).values()) / job.micro_tokens
    assert per_token == pytest.approx(flops_per_token(job.model, job.seq_len), rel=0.04)
