"""The attention router against its definition and against NumPy."""

import numpy as np
import pytest
import torch

from ptm.kernels import router
from ptm.kernels.router import attention_router_reference, top_experts
from tests.support.compare import TOLERANCE, assert_same_maths, distance, random


def attention_router(q, k, v, num_active, bias=None):
    return router.attention_router(torch.cat([q, k, v], dim=1), num_active, bias)


def numpy_scores(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    rows = []
    for q_E, k_E, v_E in zip(q, k, v):
        products = np.outer(q_E, k_E)
        weights = np.exp(products - products.max(1, keepdims=True))
        rows.append((weights / weights.sum(1, keepdims=True)) @ v_E)
    return np.stack(rows)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_scores_are_the_attention_of_experts(scale):
    q, k, v = (random(64, 32, dtype=torch.float64, seed=i, grad=False) * scale for i in range(3))
    expected = numpy_scores(q.numpy(), k.numpy(), v.numpy())
    chosen = attention_router(q, k, v, 2)
    assert np.abs(chosen.scores_TE.numpy() - expected).max() <= 1e-10 * scale
    order = np.argsort(-expected, axis=1, kind="stable")[:, :2]
    assert np.array_equal(chosen.ids_TA.numpy(), order)
    best = np.exp(np.take_along_axis(expected, order, 1) - expected.max(1, keepdims=True))
    assert np.abs(chosen.weights_TA.numpy() - best / best.sum(1, keepdims=True)).max() <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "E", "A"), [(0, 4, 2), (1, 1, 1), (50, 32, 2), (7, 5, 5)])
def test_weights_and_gradients_agree_with_autograd(T, E, A, dtype):
    # Halved, as products of unit normals reach 10, and softmaxes that sharp magnify rounding alone.
    qkv = [(random(T, E, dtype=dtype, seed=i, grad=False) / 2).requires_grad_() for i in range(3)]
    assert_same_maths(
        lambda *qkv: attention_router(*qkv, A).weights_TA,
        lambda *qkv: attention_router_reference(*qkv, A).weights_TA,
        qkv,
        grad=random(T, A, dtype=dtype, seed=7, grad=False),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize(("T", "E", "A"), [(0, 4, 2), (1, 1, 1), (50, 32, 2), (7, 5, 5)])
def test_gradients_through_all_scores_agree_with_autograd(T, E, A, with_weights, dtype):
    qkv = [(random(T, E, dtype=dtype, seed=i, grad=False) / 2).requires_grad_() for i in range(3)]

    def results(router):
        def found(*qkv):
            chosen = router(*qkv, A)
            return torch.cat([chosen.weights_TA * with_weights, chosen.scores_TE], dim=1)

        return found

    assert_same_maths(
        results(attention_router),
        results(attention_router_reference),
        qkv,
        grad=random(T, A + E, dtype=dtype, seed=7, grad=False),
    )


def test_a_bias_changes_the_choice_and_not_the_weights():
    q, k, v = (random(40, 8, dtype=torch.float64, seed=i) for i in range(3))
    bias = torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0, -5.0])
    plain, biased = attention_router(q, k, v, 2), attention_router(q, k, v, 2, bias)
    assert torch.equal(biased.scores_TE, plain.scores_TE)
    assert (biased.ids_TA[:, 0] == 2).all() and (biased.ids_TA != 7).all()
    assert torch.equal(biased.weights_TA, plain.scores_TE.gather(1, biased.ids_TA).softmax(-1))


def test_large_products_do_not_overflow():
    q, k, v = (random(16, 8, seed=i, grad=False) * 1e4 for i in range(3))
    chosen = attention_router(q, k, v, 2)
    assert torch.isfinite(chosen.scores_TE).all()
    expected = attention_router_reference(q, k, v, 2)
    assert distance(chosen.scores_TE, expected.scores_TE) <= TOLERANCE[torch.float32]


def test_the_lowest_id_wins_a_tie():
    scores = torch.zeros(3, 6)
    scores[1, 4] = 1.0
    scores[2, [1, 3, 5]] = 1.0
    assert top_experts(scores, 3).tolist() == [[0, 1, 2], [4, 0, 1], [1, 3, 5]]
    # Equal values make all scores equal whatever queries and keys are; none may be chosen twice.
    q, k = random(5, 8, grad=False), random(5, 8, seed=1, grad=False)
    assert attention_router(q * 0, k, k * 0 + 0.5, 2).ids_TA.tolist() == [[0, 1]] * 5
