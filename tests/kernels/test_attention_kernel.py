"""Attention against its definition, blocked and not, with and without documents."""

import pytest
import torch

from ptm.kernels import attention
from ptm.kernels.attention import BLOCK, attention_reference, causal_attention
from tests.support.compare import TOLERANCE, assert_same_maths, distance, random


def document_mask(B: int, L: int, starts: list[list[int]]) -> torch.Tensor:
    ids = torch.zeros(B, L, dtype=torch.int64)
    for row, cuts in enumerate(starts):
        ids[row, cuts] = 1
    ids = ids.cumsum(1)
    return (ids[:, :, None] == ids[:, None, :]).tril()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("kept", [0, 1024], ids=["recomputed", "kept"])
def test_agrees_with_the_definition(length, masked, kept, dtype, monkeypatch):
    monkeypatch.setattr(attention, "KEPT_LENGTH", kept)
    shape = (2, 3, length, 8)
    q, k, v = (random(*shape, dtype=dtype, seed=i) for i in range(3))
    mask = document_mask(2, length, [[length // 3], [length // 2, length - 1]]) if masked else None
    assert_same_maths(
        lambda q, k, v: causal_attention(q, k, v, mask),
        lambda q, k, v: attention_reference(q, k, v, mask),
        [q, k, v],
        grad=random(*shape, dtype=dtype, seed=5, grad=False),
    )


@pytest.mark.parametrize(("new", "seen"), [(1, 0), (1, 9), (4, 9), (10, 0)])
def test_the_last_of_many_positions_see_all_before_them(new, seen):
    q, k, v = (random(2, 3, n, 8, seed=n, grad=False) for n in (new, new + seen, new + seen))
    found = causal_attention(q, k, v)
    assert distance(found, attention_reference(q, k, v)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", [(0, 2, 4, 8), (2, 2, 0, 8)], ids=str)
def test_no_rows(shape):
    q, k, v = (random(*shape) for _ in range(3))
    causal_attention(q, k, v).sum().backward()
    assert q.grad.shape == shape


def test_dropout_drops_and_repeats_with_the_generator():
    q, k, v = (random(1, 2, 64, 8, seed=i, grad=False) for i in range(3))
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(causal_attention(q, k, v, dropout=0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert distance(draws[0], causal_attention(q, k, v)) > 0.1
