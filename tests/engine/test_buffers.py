"""The router's bias is part of the state: saved, committed, restored, the same on all ranks."""

from dataclasses import replace

import pytest
import torch

from ptm.engine.config import EngineConfig
from tests.support.mesh import mesh_of_test
from tests.support.paged import MODEL, make_engine, run_steps
from tests.support.ranks import run_ranks

BIASED = replace(MODEL, router_bias_update_rate=0.01)


def _go(rank, world, ep, folder, first, last):
    mesh = mesh_of_test(rank, world, ep)
    config = EngineConfig(page_mib=1, ep=ep, ssd_path=folder)
    engine = make_engine(mesh, config=config, model=BIASED)
    before = engine.buffers["router_bias"].clone()
    for step in range(first, last):
        nll = run_one(engine, mesh, step)
    rows = engine.state()["model.router_bias"]
    assert rows.num_rows == (len(before) if rank == 0 else 0)
    after = engine.buffers["router_bias"].clone()
    engine.close()
    return before.numpy(), after.numpy(), nll if last > first else None


def run_one(engine, mesh, step):
    (outcome,) = run_steps(engine, mesh, range(step, step + 1), commit=False)
    counts = mesh.sum_counts(engine.model.take_expert_counts())
    engine.model.update_router_bias(counts)
    engine.commit(step + 1, {"updates": engine.updates})
    return outcome.loss


@pytest.mark.parametrize("moved", [(2, 1), (1, 1), (2, 2)])
def test_a_bias_is_committed_with_its_step_and_moves_with_the_run(moved, tmp_path):
    first = run_ranks(2, _go, 1, str(tmp_path), 0, 3)
    wanted = first[0][1]
    assert (wanted != 0).any() and (first[1][1] == wanted).all()
    again = run_ranks(moved[0], _go, moved[1], str(tmp_path), 3, 3)
    for before, _, _ in again:
        assert (before == wanted).all()


def test_a_load_on_rank_0_reaches_all_ranks():
    for bias in run_ranks(2, _load):
        assert (bias == 0.5).all()


def _load(rank, world):
    mesh = mesh_of_test(rank, world)
    engine = make_engine(mesh, model=BIASED)
    rows = engine.state()["model.router_bias"]
    if rows.num_rows:
        rows.write(torch.full(rows.shape, 0.5))
    engine.publish()
    return engine.buffers["router_bias"].numpy()
