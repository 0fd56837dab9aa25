"""Where pages lie, which leave, and when they move changes no bit of a run."""

import hashlib
import random
from dataclasses import replace

import pytest
import torch

from ptm.common.errors import PlanError
from ptm.engine.config import EngineConfig, PolicyKind
from tests.support.mesh import mesh_of_test
from tests.support.paged import MODEL, make_engine, run_steps, whole_state
from tests.support.ranks import run_ranks

WIDE = replace(MODEL, moe_intermediate_size=512, num_experts=8, num_hidden_layers=4)


def _run(rank, world, ep, zero, dtype, steps, keys):
    mesh = mesh_of_test(rank, world, ep)
    config = EngineConfig(page_mib=1, ep=ep, **keys)
    engine = make_engine(mesh, zero=zero, dtype=dtype, config=config, model=WIDE)
    outcomes = run_steps(engine, mesh, range(steps), micro_batches=2)
    digest = hashlib.sha256()
    for _, (_, rows) in sorted(whole_state(engine).items()):
        digest.update(rows.tobytes())
    report = engine.report()
    plans = engine.tiers.paging.num_plans if engine.tiers.paging else 0
    engine.close()
    return [o.loss.hex() for o in outcomes], digest.hexdigest(), report, plans


def _least(world: int, ep: int, zero: int, dtype: torch.dtype) -> int:
    """The smallest budget that is admitted, from the refusal of one that is not (MiB)."""
    with pytest.raises(AssertionError, match="must be") as refused:
        run_ranks(world, _run, ep, zero, dtype, 0, {"cpu_bytes": "1KiB", "ssd_path": "/tmp"})
    text = str(refused.value)
    return int(text.split("must be ")[1].split("MiB")[0])


@pytest.mark.parametrize(
    "world, ep, zero, dtype, seed",
    [
        (1, 1, 3, torch.bfloat16, 0),
        pytest.param(2, 1, 3, torch.bfloat16, 1, marks=pytest.mark.slow),
        (2, 2, 1, torch.float32, 2),
        pytest.param(1, 1, 1, torch.float32, 3, marks=pytest.mark.slow),
        pytest.param(2, 2, 3, torch.bfloat16, 4, marks=pytest.mark.slow),
        pytest.param(4, 2, 3, torch.bfloat16, 5, marks=pytest.mark.slow),
    ],
)
def test_placements_differ_in_no_bit(world, ep, zero, dtype, seed, tmp_path):
    draw = random.Random(seed)
    steps = 50 if seed > 2 else 12
    wanted = run_ranks(world, _run, ep, zero, dtype, steps, {}, timeout_s=240)
    least = _least(world, ep, zero, dtype)
    budgets = [least, least + draw.randint(1, 4), None]
    for i, budget in enumerate(budgets):
        policy = draw.choice(list(PolicyKind)) if i else PolicyKind.next_use
        keys = {
            "ssd_path": str(tmp_path / f"{i}"),
            "cpu_bytes": budget and f"{budget}MiB",
            "policy": policy,
            "journal_every": draw.choice([1, 1, 3]),
        }
        (tmp_path / f"{i}").mkdir()
        found = run_ranks(world, _run, ep, zero, dtype, steps, keys, timeout_s=240)
        for rank in range(world):
            assert found[rank][:2] == wanted[rank][:2], (keys, rank)
        if i == 0 and world < 4:  # a quarter of this model fits into the least of memory
            assert found[0][2]["pages_reads"] > 0, "nothing was ever fetched: not a test of paging"
            assert found[0][3] >= 1, "no schedule was made"


def test_a_budget_below_the_least_is_refused_with_the_tier_table():
    with pytest.raises(AssertionError) as refused:
        run_ranks(1, _run, 1, 3, torch.bfloat16, 0, {"cpu_bytes": "1MiB"})
    text = str(refused.value)
    assert PlanError.__name__ in text
    assert "engine.cpu_bytes=1MiB: must be" in text and "pages in memory" in text
