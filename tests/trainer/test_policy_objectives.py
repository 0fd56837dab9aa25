"""The losses that the modes dpo and grpo minimise, from a model to the step's gradient, against the
formulas in float64: one answer at a time, unpadded, all logits held."""

import torch
from torch import Tensor

from ptm.data.preferences import Answer, padded
from ptm.trainer.objectives import GrpoBatch, PairBatch, preferring, rewarded
from ptm.trainer.policy import DEVIATION_EPS, advantages
from ptm.trainer.policy_config import DpoConfig, GrpoConfig
from tests.support.tiny import tiny_model

Row = tuple[list[int], list[int]]


def model_of(noise: float, *, dtype: torch.dtype):
    """The same weights but for `noise` of their deviation; 8 experts as a full choice of all, so
    that no rounding flips a route."""
    model = tiny_model(0, dtype=torch.float64, num_experts=8, num_experts_per_tok=8)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight += noise * float(weight.std()) * torch.randn_like(weight)
    return model.to(dtype)


def rows(count: int) -> list[Row]:
    """Prompts and answers of different lengths."""
    generator = torch.Generator().manual_seed(7)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (), generator=generator))
        return torch.randint(96, (length,), generator=generator).tolist()

    return [(ids(2, 7), ids(1, 6)) for _ in range(count)]


def batch_of(some: list[Row]):
    answers = []
    for prompt, answer in some:
        learned = torch.tensor([False] * len(prompt) + [True] * len(answer)).numpy()
        answers.append(Answer(torch.tensor(prompt + answer).numpy(), learned))
    return padded(answers, filler_id=0)


def by_token(model, row: Row, temperature: float) -> Tensor:
    """log p of each token of the answer."""
    prompt, answer = row
    log_p = torch.log_softmax(model(torch.tensor([prompt + answer]))[0] / temperature, -1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return torch.stack([log_p[place, token] for place, token in zip(places, answer)])


def gradient(model, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.double().flatten() for g in found if g is not None])


def assert_equal(model, loss: Tensor, exact, wanted: Tensor) -> None:
    assert abs(float(loss.detach()) - float(wanted.detach())) < 1e-5
    ours, theirs = gradient(model, loss), gradient(exact, wanted)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_grpo_from_the_model_to_the_gradient():
    temperature, clip, kl_coef, size = 0.7, 0.2, 0.3, 3
    some = rows(12)
    rewards = [0.0, 1, 0, 1, 1, 0, 1, 1, 1, 0.5, 0, 2]
    exact = model_of(0.05, dtype=torch.float64)
    before, first = (model_of(noise, dtype=torch.float64) for noise in (0.0, 0.1))

    total, ratios = torch.zeros((), dtype=torch.float64), []
    for i, row in enumerate(some):
        group = rewards[i - i % size : i - i % size + size]
        mean = sum(group) / size
        deviation = (sum((r - mean) ** 2 for r in group) / (size - 1)) ** 0.5
        advantage = (rewards[i] - mean) / (deviation + DEVIATION_EPS)
        new = by_token(exact, row, temperature)
        old, reference = (by_token(m, row, temperature).detach() for m in (before, first))
        for t in range(len(new)):
            ratio = torch.exp(new[t] - old[t])
            bounded = torch.clamp(ratio, 1 - clip, 1 + clip)
            kl = torch.exp(reference[t] - new[t]) - (reference[t] - new[t]) - 1
            total = total - torch.minimum(ratio * advantage, bounded * advantage) + kl_coef * kl
            ratios.append(float(ratio.detach()))
    wanted = total / sum(len(answer) for _, answer in some)
    assert min(ratios) < 1 - clip and max(ratios) > 1 + clip  # clipping has a part

    model = model_of(0.05, dtype=torch.float32)
    objective = rewarded(GrpoConfig(temperature=temperature, clip=clip, kl_coef=kl_coef))
    losses = []
    for start in (0, 6):  # whole groups
        batch = batch_of(some[start : start + 6])
        with torch.no_grad():
            old, reference = (
                m.float().log_probs(batch, temperature=temperature) for m in (before, first)
            )
        gains = advantages(torch.tensor(rewards[start : start + 6]), size)
        routes = torch.arange(8).expand(*batch.labels.shape, 2, 8)
        losses.append(objective(model, GrpoBatch(batch, old, gains, reference, routes, {})))
    tokens = sum(int(one.tokens) for one in losses)
    assert_equal(model, torch.stack([one.total for one in losses]).sum() / tokens, exact, wanted)


def test_dpo_from_the_model_to_the_gradient():
    beta = 0.4
    some = [(rows(8)[i - i % 2][0], rows(8)[i][1]) for i in range(8)]  # two answers to a prompt
    exact, first = (model_of(noise, dtype=torch.float64) for noise in (0.05, 0.0))
    total = torch.zeros((), dtype=torch.float64)
    for p in range(0, 8, 2):
        gains = [
            (by_token(exact, row, 1.0) - by_token(first, row, 1.0).detach()).sum()
            for row in some[p : p + 2]
        ]
        total = total + torch.log(1 + torch.exp(-beta * (gains[0] - gains[1])))

    model = model_of(0.05, dtype=torch.float32)
    losses = []
    for start in (0, 4):
        batch = batch_of(some[start : start + 4])
        with torch.no_grad():
            reference = first.float().log_probs(batch)
        losses.append(preferring(DpoConfig(beta=beta))(model, PairBatch(batch, reference)))
    pairs = sum(int(one.tokens) for one in losses)
    assert pairs == 4
    assert_equal(model, torch.stack([one.total for one in losses]).sum() / pairs, exact, total / 4)
