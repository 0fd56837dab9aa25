"""Rollouts, advantages, loss and update together: a policy that is paid for its first token learns
to say it, one that is paid for any other unlearns it, and the KL term holds it back. And on two
ranks the rollouts are those of one."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ptm.common.errors import Requeue
from ptm.data.rewards import RewardError, Scored
from ptm.trainer.objectives import rewarded
from ptm.trainer.signals import StopRequest
from tests.support.bandit import policy, recipe_of, rollouts_of
from tests.support.mesh import mesh_of_test
from tests.support.ranks import run_ranks

ALONE: Any = SimpleNamespace(
    rank=0, world=1, device=torch.device("cpu"), sum_counts=lambda counts: counts
)


def held_out_reward(steps: int, *, seed: int = 0, is_wanted: bool = True, kl_coef: float = 0.0):
    """Before and after `steps` steps."""
    recipe, model = recipe_of(seed, kl_coef=kl_coef), policy(seed)
    reference = policy(seed) if kl_coef else None
    rollouts = rollouts_of(recipe, ALONE, model, is_wanted=is_wanted, reference=reference)
    objective = rewarded(recipe.grpo)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    before = rollouts.evaluate()["eval_reward"]
    for step in range(steps):
        losses = [objective(model.train(), batch) for batch in rollouts.micro_batches(step)]
        tokens = sum(int(loss.tokens) for loss in losses)
        optimizer.zero_grad()
        (torch.stack([loss.total for loss in losses]).sum() / tokens).backward()
        optimizer.step()
    return before, rollouts.evaluate()["eval_reward"]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_paid_token_is_learned(seed):
    before, after = held_out_reward(30, seed=seed)
    assert before < 0.2 and after > 0.9


def test_a_token_that_costs_is_unlearned():
    before, after = held_out_reward(10, is_wanted=False)
    assert before < 0.6 and after > 0.9


def test_the_kl_term_holds_the_policy():
    before, after = held_out_reward(15, kl_coef=10.0)
    assert abs(after - before) < 0.15


def micro_batches(mesh) -> list[dict[str, np.ndarray]]:
    rollouts = rollouts_of(recipe_of(3), mesh, policy(3))
    return [
        {
            "tokens": batch.batch.labels.numpy(),
            "learned": batch.batch.loss_mask.numpy(),
            "log_probs": batch.rollout_BL.numpy(),
            "advantages": batch.advantages_B.numpy(),
            "routes": batch.routes_BLNA.numpy(),
        }
        for batch in rollouts.micro_batches(5)
    ]


def on_a_rank(rank: int, world: int) -> list[dict[str, np.ndarray]]:
    return micro_batches(mesh_of_test(rank, world))


def test_two_ranks_draw_what_one_draws():
    wanted = micro_batches(ALONE)
    found = [batch for rank in run_ranks(2, on_a_rank) for batch in rank]
    assert len(found) == len(wanted) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        # A rank goes on until all ranks have ended: columns behind a row's end may be more.
        length = min(ours["tokens"].shape[1], theirs["tokens"].shape[1])
        for name, values in ours.items():
            kept = slice(None) if values.ndim == 1 else (slice(None), slice(length))
            assert np.array_equal(values[kept], theirs[name][kept]), name


class Failing:
    """Raises for this rank's answers, or for all of them but the first."""

    log = None

    def __init__(self, error: str, spared: int = 0) -> None:
        self.error, self.spared = error, spared

    def score(self, rows: list[Any], is_stopped: object = None) -> Scored:
        spared, self.spared = min(self.spared, len(rows)), 0
        return Scored([0.0] * len(rows), len(rows) - spared, 0, self.error)


def rollouts_that_fail(rank: int, world: int, spared: int) -> str:
    mesh, error = mesh_of_test(rank, world), f"ValueError: of rank {rank}"
    rewarder = Failing(error if rank else "", spared if rank else 0)
    rollouts = rollouts_of(recipe_of(3), mesh, policy(3), rewarder=rewarder)
    try:
        return f"{len(rollouts.micro_batches(5))} micro-batches"
    except RewardError as error:
        return str(error)


def test_a_reward_that_fails_for_every_answer_of_a_step_ends_the_run_on_all_ranks():
    first, second = run_ranks(2, rollouts_that_fail, 0)
    assert first == second and re.fullmatch(
        r"grpo.reward=exact: failed for all \d+ answers of step 6 \(ValueError: of rank 1\); .*",
        first,
    )
    assert run_ranks(2, rollouts_that_fail, 1) == ["1 micro-batches"] * 2


def rollouts_that_stop(rank: int, world: int) -> str:
    stop = StopRequest()
    rollouts = rollouts_of(recipe_of(3), mesh_of_test(rank, world), policy(3), stop=stop)
    assert len(rollouts.micro_batches(5)) == 1
    stop.signal_name = "SIGTERM" if rank else ""
    try:
        return f"{len(rollouts.micro_batches(6))} micro-batches"
    except Requeue as error:
        return str(error)


def test_a_signal_to_one_rank_ends_the_rollouts_of_all():
    told = "stopped within the answers of step 7; the same command goes on from there"
    assert run_ranks(2, rollouts_that_stop) == [told] * 2
