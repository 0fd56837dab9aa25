"""The two means against uneven loads: the loss against its formula written out, the bias by what it
does to a skewed router."""

import numpy as np
import pytest
import torch

from ptm.model.config import RouterKind
from ptm.model.router import balance_loss, moved_bias
from ptm.model.transformer import Transformer
from tests.model.test_router import router_of, softmax
from tests.support.compare import distance, random
from tests.support.tiny import documents, packed, tiny_config, tiny_model

COEF = 0.01


def by_hand(routing, real: np.ndarray, num_routed: int) -> float:
    """E x sum of (rows of e / tokens) x (mean probability of e), over real tokens."""
    probability = softmax(routing.scores_TE.detach().numpy())[real]
    ids = routing.ids_TA.numpy()[real]
    total = 0.0
    for e in range(num_routed):
        total += (ids == e).sum() / len(ids) * probability[:, e].mean()
    return num_routed * total


@pytest.mark.parametrize("kind", RouterKind, ids=str)
def test_the_balance_loss_is_its_formula_over_real_tokens(kind):
    model = tiny_model(dtype=torch.float64, router=kind, router_aux_loss_coef=COEF).train()
    seen = []
    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(lambda gate, args, routing: seen.append(routing))
    batch = packed([documents(40, 24), documents(64, seed=1)])
    batch.document_ids[1, 50:] = -1  # filler
    batch.loss_mask[1, 50:] = False
    batch.loss_mask[0, :10] = False  # read, but not learnt
    loss = model.loss(batch)
    real = (batch.document_ids != -1).flatten().numpy()
    num_routed = 31 if kind is RouterKind.shared_expert else 32
    wanted = np.mean([by_hand(routing, real, num_routed) for routing in seen])
    assert loss.tokens == 64 - 10 + 50
    assert loss.aux_sum is not None
    assert loss.aux_sum.item() == pytest.approx(COEF * 104 * wanted, rel=1e-12)
    assert loss.total.item() == loss.nll_sum.item() + loss.aux_sum.item()
    plain = tiny_model(dtype=torch.float64, router=kind).train().loss(batch)
    assert plain.nll_sum.item() == loss.nll_sum.item()  # what is reported is without it


def test_an_even_load_costs_the_active_experts_and_all_to_one_costs_all():
    router = router_of(RouterKind.linear, num_experts=4, num_experts_per_tok=1)
    x = torch.zeros(8, 32, dtype=torch.float64)
    even = balance_loss(router(x).scores_TE, torch.tensor([2, 2, 2, 2]), None)
    sure = torch.tensor([[60.0, 0.0, 0.0, 0.0]]).expand(8, 4)
    assert even.item() == 1.0
    assert balance_loss(sure, torch.tensor([8, 0, 0, 0]), None).item() == pytest.approx(4.0)


@pytest.mark.parametrize("kind", RouterKind, ids=str)
def test_minimising_the_loss_evens_the_load(kind):
    model = tiny_model(router=kind, router_aux_loss_coef=1.0).train()
    batch = packed([documents(64, seed=i) for i in range(4)])
    gates = [p for block in model.model.layers for p in block.mlp.gate.parameters()]
    optimizer = torch.optim.Adam(gates, lr=0.02)
    seen = []
    for _ in range(30):
        loss = model.loss(batch)
        seen.append(loss.aux_sum.item() / loss.tokens.item())
        optimizer.zero_grad()
        loss.aux_sum.backward()
        optimizer.step()
    even = 1 if kind is RouterKind.shared_expert else 2  # routed experts of a token
    assert abs(seen[-1] - even) < 0.5 * (seen[0] - even)


def test_off_by_default_and_in_evaluation():
    batch = packed([documents(16)])
    plain = tiny_model().train()
    assert plain.loss(batch).aux_sum is None and plain.router_bias is None
    loss = plain.loss(batch)
    assert loss.total is loss.nll_sum
    assert "router_bias" not in plain.state_dict()
    assert tiny_model(router_aux_loss_coef=COEF).eval().loss(batch).aux_sum is None


def skewed_run(kind: RouterKind) -> tuple[list[float], torch.Tensor]:
    """Busiest over mean of the routed experts, step after step, and the bias at the end."""
    model = tiny_model(router=kind, router_bias_update_rate=0.02, num_experts=8).train()
    batch = packed([documents(64, seed=i) for i in range(4)])
    uneven = []
    for _ in range(60):
        with torch.no_grad():
            model.loss(batch)
        counts = model.take_expert_counts()
        model.update_router_bias(counts)
        routed = counts[:, :7].double()
        uneven.append((routed.amax(1) / routed.mean(1)).max().item())
    return uneven, model.state_dict()["router_bias"]


@pytest.mark.parametrize("kind", RouterKind, ids=str)
def test_the_bias_evens_the_load_in_the_same_bits_twice(kind):
    uneven, bias = skewed_run(kind)
    assert np.mean(uneven[-5:]) < 1 + 0.5 * (uneven[0] - 1)
    again = skewed_run(kind)
    assert again[0] == uneven and torch.equal(again[1], bias)
    assert bias.dtype == torch.float32 and bias.shape == (2, 8)
    if kind is RouterKind.shared_expert:
        assert not bias[:, 7].any()


def test_a_step_of_the_bias():
    counts = torch.tensor([[5, 1, 3, 3], [0, 0, 0, 0], [7, 2, 2, 9]])
    moved = moved_bias(torch.zeros(3, 4), counts, 0.5)
    assert moved.tolist() == [[-0.5, 0.5, 0, 0], [0, 0, 0, 0], [-0.5, 0.5, 0.5, -0.5]]
    moved = moved_bias(torch.ones(3, 4), counts, 0.5, 1)  # the last is shared
    assert moved.tolist() == [[0.5, 1.5, 1, 1], [1, 1, 1, 1], [0.5, 1.5, 1.5, 1]]


@pytest.mark.parametrize("kind", RouterKind, ids=str)
def test_weights_are_those_of_the_unbiased_scores(kind):
    router = router_of(kind)
    x = random(20, 32, dtype=torch.float64, grad=False)
    bias = torch.zeros(32)
    bias[[3, 4]] = 100.0
    routing = router(x, bias)
    scores = routing.scores_TE
    assert torch.equal(scores, router(x).scores_TE)
    if kind is RouterKind.shared_expert:
        assert (routing.ids_TA == torch.tensor([3, 31]) + (routing.ids_TA == 4).long()).all()
        wanted = scores.softmax(-1).gather(1, routing.ids_TA[:, :1])
        assert torch.equal(routing.weights_TA[:, :1], wanted)
    else:
        assert routing.ids_TA.sort(1).values.tolist() == [[3, 4]] * 20
        assert torch.equal(routing.weights_TA, scores.gather(1, routing.ids_TA).softmax(-1))


def test_a_bias_of_zero_changes_no_bit():
    batch = packed([documents(40, 24)])
    losses = [
        tiny_model(router_bias_update_rate=rate).train().loss(batch).nll_sum for rate in (0, 0.1)
    ]
    assert torch.equal(*losses)


def test_the_bias_is_fp32_whatever_the_model():
    config = tiny_config(router_bias_update_rate=0.001)
    for device in ("cpu", "meta"):
        model = Transformer(config, dtype=torch.bfloat16, device=device)
        assert model.router_bias is not None and model.router_bias.dtype == torch.float32
        assert "router_bias" in model.state_dict()


def test_the_gradient_of_the_loss_by_finite_differences():
    model = tiny_model(dtype=torch.float64, router_aux_loss_coef=1.0, num_experts=4).train()
    batch = packed([documents(24)])
    weight = model.model.layers[1].mlp.gate.key.weight
    (grad,) = torch.autograd.grad(model.loss(batch).aux_sum, [weight])
    way, eps = random(*weight.shape, dtype=torch.float64, grad=False), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * eps * way
            values.append(model.loss(batch).aux_sum)
            weight -= sign * eps * way
    slope = (values[0] - values[1]) / (2 * eps)
    assert distance((grad * way).sum()[None], slope[None]) <= 1e-6
