"""Losses over log-probabilities against their definitions in fp64, and what they promise."""

import math

import pytest
import torch

from ptm.trainer.policy import DEVIATION_EPS, advantages, dpo, grpo


def numbers(rows=8, length=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy, other, third = (
        -3 * torch.rand(rows, length, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    ends = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return policy, policy + 0.3 * (other - policy), third, torch.arange(length) < ends


@pytest.mark.parametrize("length_normalised", [False, True])
def test_dpo_is_its_formula(length_normalised):
    policy, reference, _, mask = numbers()
    found = dpo(
        policy.float(), reference.float(), mask, beta=0.7, length_normalised=length_normalised
    )
    for p in range(4):
        rewards = []
        for row in (2 * p, 2 * p + 1):
            terms = [float(policy[row, i] - reference[row, i]) for i in range(11) if mask[row, i]]
            rewards.append(math.fsum(terms) / (len(terms) if length_normalised else 1))
        margin = 0.7 * (rewards[0] - rewards[1])
        assert float(found.margins_P[p]) == pytest.approx(margin, abs=1e-5)
        assert float(found.losses_P[p]) == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-5)
    assert (found.kl_P > 0).all()
    same = dpo(policy, policy, mask, beta=0.7)
    assert (same.kl_P == 0).all()
    torch.testing.assert_close(same.losses_P, torch.full_like(same.losses_P, math.log(2)))


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_grpo_is_its_formula(kl_coef):
    policy, rollout, reference, mask = numbers(seed=1)
    gains = advantages(torch.tensor([0.0, 1, 0.5, 0, 1, 1, 0, 0]), 4)
    found = grpo(
        policy.float(),
        rollout.float(),
        gains.float(),
        mask,
        clip=0.2,
        kl_coef=kl_coef,
        reference_BL=reference.float(),
    )
    num_clipped = 0
    for b in range(8):
        for i in range(11):
            ratio = math.exp(policy[b, i] - rollout[b, i])
            bounded = min(max(ratio, 0.8), 1.2)
            a = float(gains[b])
            loss = -min(ratio * a, bounded * a)
            difference = float(reference[b, i] - policy[b, i])
            kl = math.exp(difference) - difference - 1
            want = (loss + kl_coef * kl) * float(mask[b, i])
            assert float(found.losses_BL[b, i]) == pytest.approx(want, abs=1e-5)
            num_clipped += bool(mask[b, i]) and bounded * a < ratio * a
    assert int(found.clipped_BL.sum()) == num_clipped > 0


def test_a_clipped_token_has_no_gradient():
    policy, rollout, _, mask = numbers(seed=2)
    policy.requires_grad_()
    found = grpo(policy, rollout, torch.ones(8, dtype=torch.float64), mask, clip=0.2)
    found.losses_BL.sum().backward()
    assert policy.grad is not None
    assert torch.equal(policy.grad != 0, mask & ~found.clipped_BL) and found.clipped_BL.any()


def test_advantages_compare_within_a_group():
    found = advantages(torch.tensor([1.0, 0, 0, 0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64), 4)
    assert torch.equal(found[4:], torch.zeros(4, dtype=torch.float64))
    deviation = 0.5  # of 1, 0, 0, 0, with n - 1
    assert float(found[0]) == pytest.approx(0.75 / (deviation + DEVIATION_EPS))
    assert abs(float(found[:4].sum())) < 1e-12
