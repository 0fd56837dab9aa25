"""Losses over log-probabilities: pure functions, for preferences (DPO) and rewards (GRPO).

DPO (arXiv 2305.18290), of a pair of answers to one prompt, with r = log p_policy - log p_reference
summed over an answer's tokens, or averaged over them where length-normalised (as in Tulu 3):

    loss = -log sigmoid(beta (r_chosen - r_rejected))

GRPO (arXiv 2402.03300), of the answers to one prompt, a group, with a ratio p / p_rollout per
token:

    advantage = (reward - mean of the group) / (deviation of the group + 1e-4)
    loss      = -min(ratio A, clip(ratio, 1 - e, 1 + e) A) + kl_coef KL,
    KL        = p_ref / p - log(p_ref / p) - 1        (Schulman's estimator: positive, unbiased)

summed over the tokens of all answers and divided by their number, so that a long answer is not
cheaper per token than a short one (DAPO, arXiv 2503.14476).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DEVIATION_EPS = 1e-4
"""As in TRL: a group that nearly agrees is not blown up."""


class Preference(NamedTuple):
    """Of P pairs, (P,) each. margins: beta times the difference of the two rewards."""

    losses_P: Tensor
    margins_P: Tensor
    kl_P: Tensor
    "Estimate of KL(policy || reference) per token, mean over both answers."


def dpo(
    log_probs_RL: Tensor,
    reference_RL: Tensor,
    mask_RL: Tensor,
    *,
    beta: float,
    length_normalised: bool = False,
) -> Preference:
    """Shapes: rows (R = 2P, L), chosen and rejected in turn; mask: the answers' tokens."""
    log_ratios_RL = (log_probs_RL - reference_RL) * mask_RL
    rewards_R = log_ratios_RL.sum(1)
    tokens_R = mask_RL.sum(1).clamp(min=1)
    if length_normalised:
        rewards_R = rewards_R / tokens_R
    margins_P = beta * (rewards_R[0::2] - rewards_R[1::2])
    kl_R = (_kl(log_probs_RL, reference_RL) * mask_RL).sum(1) / tokens_R
    return Preference(-F.logsigmoid(margins_P), margins_P, (kl_R[0::2] + kl_R[1::2]) / 2)


class Policy(NamedTuple):
    """Of rows of answers, (B, L) each, 0 where the mask is."""

    losses_BL: Tensor
    kl_BL: Tensor
    clipped_BL: Tensor
    "Bool: where clipping took the gradient away."


def grpo(
    log_probs_BL: Tensor,
    rollout_BL: Tensor,
    advantages_B: Tensor,
    mask_BL: Tensor,
    *,
    clip: float,
    kl_coef: float = 0.0,
    reference_BL: Tensor | None = None,
) -> Policy:
    """rollout: log-probabilities when the tokens were drawn; reference: needed for a KL term."""
    ratios_BL = ((log_probs_BL - rollout_BL) * mask_BL).exp()
    advantages_B1 = advantages_B[:, None]
    free_BL = ratios_BL * advantages_B1
    bounded_BL = ratios_BL.clamp(1 - clip, 1 + clip) * advantages_B1
    losses_BL = -torch.minimum(free_BL, bounded_BL)
    kl_BL = torch.zeros_like(losses_BL)
    if reference_BL is not None:
        kl_BL = _kl(log_probs_BL, reference_BL)
        losses_BL = losses_BL + kl_coef * kl_BL
    clipped_BL = (bounded_BL < free_BL) & mask_BL
    return Policy(losses_BL * mask_BL, kl_BL * mask_BL, clipped_BL)


def advantages(rewards_B: Tensor, group_size: int) -> Tensor:
    """Rewards relative to those of the group, (B,); groups are contiguous, one of equal rewards
    gives zeros."""
    rewards_GS = rewards_B.view(-1, group_size)
    mean_G1 = rewards_GS.mean(1, keepdim=True)
    centred_GS = rewards_GS - mean_G1
    equal_G1 = (rewards_GS == rewards_GS[:, :1]).all(1, keepdim=True)
    centred_GS = centred_GS.masked_fill(equal_G1, 0.0)  # not what rounding leaves of them
    return (centred_GS / (rewards_GS.std(1, keepdim=True) + DEVIATION_EPS)).flatten()


def _kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    difference = reference - log_probs
    return difference.exp() - difference - 1
