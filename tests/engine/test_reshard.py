"""A run that goes on from its page files, on the same ranks and on others."""

import itertools
import shutil
from dataclasses import replace

import pytest
import torch

from ptm.engine.config import EngineConfig
from tests.support.mesh import mesh_of_test
from tests.support.paged import MODEL, assemble, make_engine, run_steps, whole_state
from tests.support.ranks import run_ranks

GRIDS = [(n, e) for n, e in itertools.product([1, 2, 3, 4], [1, 2, 4]) if n % e == 0]
# 3 ranks cannot share 8 rows evenly, so their engine trains on what divides, as the loader does.


def _go(rank, world, ep, folder, first, last, dtype):
    mesh = mesh_of_test(rank, world, ep)
    config = EngineConfig(page_mib=1, ep=ep, ssd_path=folder)
    engine = make_engine(mesh, zero=3, dtype=dtype, config=config)
    restored = engine.restored
    before = whole_state(engine)
    outcomes = run_steps(engine, mesh, range(first, last))
    after = whole_state(engine)
    engine.close()
    return restored and restored[0], before, [o.loss.hex() for o in outcomes], after


def _whole(found, which):
    return assemble([rank[which] for rank in found])


FAST = [(2, 1), (4, 2)]
OLD = [pytest.param(old, marks=() if old in FAST else pytest.mark.slow) for old in GRIDS]


@pytest.mark.parametrize("old", OLD, ids=str)
def test_states_are_the_same_bits_on_any_other_ranks(old, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    saved = run_ranks(*old[:1], _go, old[1], str(folder), 0, 2, torch.bfloat16)
    wanted = _whole(saved, 3)
    for n, e in GRIDS:
        copied = str(shutil.copytree(folder, tmp_path / f"{n}-{e}"))
        found = run_ranks(n, _go, e, copied, 2, 2, torch.bfloat16)
        assert [rank[0] for rank in found] == [2] * n
        there = _whole(found, 1)
        assert there.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(there[name], tensor), (old, (n, e), name)


@pytest.mark.parametrize("away", [(1, 1), (4, 2), (2, 2)], ids=str)
def test_there_and_back_the_next_losses_are_those_of_the_run_that_stayed(away, tmp_path):
    folder = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    run_ranks(2, _go, 1, folder, 0, 3, torch.float32)
    stay = str(shutil.copytree(folder, tmp_path / "stay"))
    wanted = run_ranks(2, _go, 1, stay, 3, 6, torch.float32)
    run_ranks(away[0], _commit_only, away[1], folder)
    found = run_ranks(2, _go, 1, folder, 3, 6, torch.float32)
    assert [rank[0] for rank in found] == [4, 4]
    assert found[0][2] == wanted[0][2]
    for name, (first, rows) in wanted[0][3].items():
        assert found[0][3][name][0] == first and (found[0][3][name][1] == rows).all()


def _commit_only(rank, world, ep, folder):
    """Go on from the other ranks' pages and commit them here, one step later, as they are."""
    mesh = mesh_of_test(rank, world, ep)
    config = EngineConfig(page_mib=1, ep=ep, ssd_path=folder)
    engine = make_engine(mesh, zero=3, dtype=torch.float32, config=config)
    assert engine.restored is not None and engine.restored[0] == 3
    engine.commit(4, {"updates": engine.updates})
    engine.drain()
    engine.close()


def _other_model(rank, world, folder):
    mesh = mesh_of_test(rank, world)
    config = EngineConfig(page_mib=1, ssd_path=folder)
    make_engine(mesh, config=config, model=replace(MODEL, vocab_size=80))


def test_pages_of_another_model_are_refused(tmp_path):
    run_ranks(2, _go, 1, str(tmp_path), 0, 1, torch.float32)
    with pytest.raises(AssertionError, match="CheckpointError"):
        run_ranks(2, _other_model, str(tmp_path))
    with pytest.raises(AssertionError, match="another model, precision or engine.moments"):
        run_ranks(1, _other_model, str(tmp_path))
