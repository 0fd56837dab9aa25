"""Routers on one seam: what each picks, and that all three cost the same (arXiv 2405.17976, table
1)."""

import numpy as np
import pytest
import torch

from ptm.model.config import ModelConfig, RouterKind, num_parameters
from ptm.model.router import ROUTERS
from tests.support.compare import random
from tests.support.tiny import tiny_config, tiny_model


def router_of(kind: RouterKind, dtype=torch.float64, **changes):
    config = tiny_config(router=kind, **changes)
    router = ROUTERS[kind](config).to(dtype)
    with torch.no_grad():
        for i, weight in enumerate(router.parameters()):
            weight.copy_(random(*weight.shape, seed=i, grad=False))
    return router


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention_oracle(router, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q, k, v = (x @ w.weight.detach().numpy().T for w in (router.query, router.key, router.value))
    scores = np.einsum("tij,tj->ti", softmax(q[:, :, None] * k[:, None, :]), v)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    return ids, softmax(np.take_along_axis(scores, ids, 1))


def linear_oracle(router, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = softmax(x @ router.weight.detach().numpy().T)
    ids = np.argsort(-p, axis=1, kind="stable")[:, :2]
    chosen = np.take_along_axis(p, ids, 1)
    return ids, chosen / chosen.sum(1, keepdims=True)


def shared_oracle(router, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = softmax(x @ router.weight.detach().numpy().T)
    best = p.argmax(1)[:, None]
    ids = np.concatenate([best, np.full_like(best, 31)], axis=1)
    return ids, np.concatenate([np.take_along_axis(p, best, 1), np.ones((len(x), 1))], axis=1)


ORACLES = {
    RouterKind.attention: attention_oracle,
    RouterKind.linear: linear_oracle,
    RouterKind.shared_expert: shared_oracle,
}


@pytest.mark.parametrize("kind", ORACLES, ids=str)
def test_agrees_with_numpy(kind):
    router, x = router_of(kind), random(50, 32, dtype=torch.float64, grad=False)
    routing = router(x)
    ids, weights = ORACLES[kind](router, x.numpy())
    assert np.array_equal(routing.ids_TA.numpy(), ids)
    assert np.abs(routing.weights_TA.detach().numpy() - weights).max() <= 1e-10
    assert routing.counts_E.tolist() == np.bincount(ids.ravel(), minlength=32).tolist()


@pytest.mark.parametrize("kind", ORACLES, ids=str)
def test_scores_in_fp32_whatever_the_model(kind):
    router, x = router_of(kind, torch.bfloat16), random(9, 32, dtype=torch.bfloat16)
    routing = router(x)
    assert routing.weights_TA.dtype == torch.float32
    assert routing.ids_TA.dtype == routing.counts_E.dtype == torch.int64
    routing.weights_TA[:, 0].sum().backward()
    for weight in router.parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ORACLES, ids=str)
@pytest.mark.parametrize("E", [1, 2, 5])
def test_few_experts(kind, E):
    if kind is RouterKind.shared_expert and E == 1:
        pytest.skip("the shared expert is one of two at least")
    A = min(E, 2)
    router = router_of(kind, num_experts=E, num_experts_per_tok=A)
    routing = router(random(6, 32, dtype=torch.float64))
    assert routing.ids_TA.shape == (6, A) and routing.counts_E.sum() == 6 * A


@pytest.mark.parametrize("shared", [1, 2])
def test_the_last_experts_are_shared_by_all_tokens(shared):
    router = router_of(
        RouterKind.shared_expert, num_experts_per_tok=2 + shared, num_shared_experts=shared
    )
    routing = router(random(20, 32, dtype=torch.float64))
    assert (routing.ids_TA[:, 2:] >= 32 - shared).all()
    assert (routing.ids_TA[:, :2] < 32 - shared).all()
    assert routing.counts_E[32 - shared :].tolist() == [20] * shared


def test_a_token_is_routed_by_itself_alone():
    x = random(12, 32, dtype=torch.float64, grad=False)
    for kind in ORACLES:
        router = router_of(kind)
        alone = [router(row[None]) for row in x]
        together = router(x)
        assert torch.equal(together.ids_TA, torch.cat([r.ids_TA for r in alone]))


def test_the_three_compare_at_equal_size_and_work():
    sizes = {kind: num_parameters(ModelConfig(router=kind)) for kind in RouterKind}
    # A shared expert needs no row of the router.
    assert sizes[RouterKind.linear] == sizes[RouterKind.shared_expert] + 24 * 2048
    extra = sizes[RouterKind.attention] - sizes[RouterKind.linear]
    assert extra == 24 * 2 * 32 * 2048  # queries and keys, 0.008 % of the model
    for kind in RouterKind:
        model = tiny_model(router=kind)
        assert sum(p.numel() for p in model.parameters()) == num_parameters(model.config)
