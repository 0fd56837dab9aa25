"""Localized filtering against two-dimensional convolutions, one document at a time."""

import pytest
import torch

from ptm.kernels.lfa import lfa, lfa_reference
from tests.support.compare import assert_same_maths, random

EPS = 1e-6


def weights(D: int, dtype) -> list[torch.Tensor]:
    shapes = [(D // 2, D, 2, 1), (D // 2,), (D, D // 2, 2, 1), (D,), (D,)]
    return [random(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]


def filtered(n, w1, b1, w2, b2, norm, connected=None):
    return lfa(n, conv1=(w1, b1), conv2=(w2, b2), norm=norm, eps=EPS, connected_BL=connected)


def one_by_one(n, w1, b1, w2, b2, norm, starts=((0,),)):
    rows = []
    for row, cuts in zip(n, starts * len(n) if len(starts) == 1 else starts):
        parts = torch.tensor_split(row, cuts[1:]) if len(cuts) > 1 else [row]
        rows.append(
            torch.cat(
                [
                    lfa_reference(part, conv1=(w1, b1), conv2=(w2, b2), norm=norm, eps=EPS)
                    for part in parts
                ]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_agrees_with_convolutions(dtype, length):
    n = random(2, length, 8, dtype=dtype)
    grad = random(2, length, 8, dtype=dtype, seed=9, grad=False)
    assert_same_maths(filtered, one_by_one, [n, *weights(8, dtype)], grad=grad)


def test_documents_are_filtered_as_if_alone():
    starts = ((0, 1, 2, 9), (0, 5, 10, 11))
    connected = torch.ones(2, 12, dtype=torch.bool)
    for row, cuts in enumerate(starts):
        connected[row, list(cuts)] = False
    grad = random(2, 12, 8, dtype=torch.float64, seed=9, grad=False)
    assert_same_maths(
        lambda *t: filtered(*t, connected=connected),
        lambda *t: one_by_one(*t, starts=starts),
        [random(2, 12, 8, dtype=torch.float64), *weights(8, torch.float64)],
        grad=grad,
    )


def test_no_rows():
    inputs = [random(0, 4, 8), *weights(8, torch.float32)]
    assert_same_maths(filtered, lambda n, *w: n + sum(x.sum() for x in w) * 0, inputs)
