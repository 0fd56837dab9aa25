"""Embedding look-up against torch's, and the sum of many rows in bf16."""

import pytest
import torch
import torch.nn.functional as F

from ptm.kernels.embedding import embedding
from tests.support.compare import assert_same_maths, distance, random


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (4, 9)], ids=str)
def test_agrees_with_torch(shape, dtype):
    ids = torch.randint(5, shape, generator=torch.Generator().manual_seed(0))
    assert_same_maths(
        lambda w: embedding(ids, w),
        lambda w: F.embedding(ids, w),
        [random(7, 6, dtype=dtype)],
        grad=random(*shape, 6, dtype=dtype, seed=1, grad=False),
    )


def test_many_rows_of_one_id_add_up_in_bf16():
    weight = random(3, 8, dtype=torch.bfloat16)
    ids = torch.ones(1000, dtype=torch.int64)
    grad = (random(1000, 8, grad=False) + 0.5).to(torch.bfloat16)
    embedding(ids, weight).backward(grad)
    assert distance(weight.grad[1], grad.double().sum(0)) <= 2**-8
    assert not weight.grad[[0, 2]].any()
