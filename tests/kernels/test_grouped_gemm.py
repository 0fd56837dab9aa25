"""Experts over grouped rows against plain autograd and a dense sum over all experts (T33)."""

import pytest
import torch
import torch.nn.functional as F

from ptm.kernels import grouped_gemm
from ptm.kernels.grouped_gemm import experts_reference, swiglu_experts
from ptm.kernels.permute import ALIGN, aligned, combine, grouped_rows, permute, slots
from tests.support.compare import TOLERANCE, assert_same_maths, distance, random

COUNTS = {
    "even": [16, 16, 16, 16],
    "uneven": [1, 0, 23, 9],
    "all to one": [0, 0, 40, 0],
    "the last only": [0, 0, 0, 3],
    "nothing": [0, 0, 0, 0],
    "one expert": [13],
}


def grouped(counts: list[int], D: int, dtype) -> torch.Tensor:
    """Rows in the grouped layout: zero between groups."""
    x = torch.zeros(grouped_rows(sum(counts), len(counts)), D, dtype=dtype)
    start = 0
    for e, count in enumerate(counts):
        x[start : start + count] = random(count, D, dtype=dtype, seed=e, grad=False)
        start += -(-count // ALIGN) * ALIGN
    return x.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_loop_agrees_with_autograd(counts, dtype):
    E, D, H = len(counts), 16, 24
    x = grouped(counts, D, dtype)
    w1, w2 = random(E, 2 * H, D, dtype=dtype), random(E, D, H, dtype=dtype)
    counts_E = torch.tensor(counts)
    # Rows between groups never carry a gradient: nobody reads them.
    grad = (x.detach() != 0) * random(*x.shape, dtype=dtype, seed=3, grad=False)
    assert_same_maths(
        lambda x, w1, w2: swiglu_experts(x, w1, w2, counts_E),
        lambda x, w1, w2: experts_reference(x, w1, w2, counts_E),
        [x, w1, w2],
        grad=grad,
    )


def mixture(x, w1, w2, weights, ids):
    counts = torch.bincount(ids.flatten(), minlength=w1.shape[0])
    place = slots(ids, counts)
    rows = permute(x, place, grouped_rows(ids.numel(), w1.shape[0]))
    return combine(swiglu_experts(rows, w1, w2, counts), place, weights)


def dense(x, w1, w2, weights, ids):
    """Every token through every expert, and zero weight for those not chosen."""
    gate, up = torch.einsum("td,egd->teg", x, w1).chunk(2, dim=-1)
    y = torch.einsum("tef,edf->ted", F.silu(gate) * up, w2)
    full = torch.zeros(x.shape[0], w1.shape[0], dtype=x.dtype).scatter(1, ids, weights.to(x.dtype))
    return torch.einsum("te,ted->td", full, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "E", "A"), [(0, 4, 2), (1, 8, 2), (61, 8, 2), (40, 3, 3), (9, 1, 1)])
def test_mixture_agrees_with_a_dense_sum(T, E, A, dtype):
    D, H = 16, 24
    ids = torch.rand(T, E, generator=torch.Generator().manual_seed(T)).argsort(1)[:, :A]
    inputs = [
        random(T, D, dtype=dtype),
        random(E, 2 * H, D, dtype=dtype),
        random(E, D, H, dtype=dtype),
        random(T, A, dtype=dtype, seed=4),
    ]
    assert_same_maths(
        lambda *t: mixture(*t, ids),
        lambda *t: dense(*t, ids),
        inputs,
        grad=random(T, D, dtype=dtype, seed=8, grad=False),
    )


def test_layout_is_grouped_aligned_and_in_token_order():
    ids = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]])
    counts = torch.bincount(ids.flatten(), minlength=4)
    assert aligned(counts).tolist() == [16, 0, 16, 16]
    assert slots(ids, counts).tolist() == [[16, 0], [1, 32], [17, 33], [2, 18]]
    rows = permute(torch.arange(1.0, 5.0)[:, None], slots(ids, counts), grouped_rows(8, 4))
    assert rows.flatten().nonzero().flatten().tolist() == [0, 1, 2, 16, 17, 18, 32, 33]
    assert rows.flatten()[[0, 1, 2, 16, 17, 18, 32, 33]].tolist() == [1, 2, 4, 1, 3, 4, 2, 3]


def test_unused_experts_get_gradients_of_exactly_zero():
    counts = torch.tensor([0, 5, 0])
    x, w1, w2 = grouped([0, 5, 0], 8, torch.float32), random(3, 16, 8), random(3, 8, 8)
    swiglu_experts(x, w1, w2, counts).sum().backward()
    for w in (w1, w2):
        used = w.grad.flatten(1).abs().sum(1) != 0
        assert used.tolist() == [False, True, False]


def test_torch_grouped_gemm_agrees_with_the_loop():
    """The products that the CUDA path is made of."""
    counts = torch.tensor([16, 0, 48, 32])
    x, w1 = grouped(counts.tolist(), 16, torch.float32).detach(), random(4, 48, 16).detach()
    offsets = aligned(counts).cumsum(0).to(torch.int32)
    n = int(offsets[-1])
    found = F.grouped_mm(x, w1.transpose(1, 2), offs=offsets)[:n]
    parts = [F.linear(r, w) for r, w in zip(x[:n].split(counts.tolist()), w1)]
    assert distance(found, torch.cat(parts)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_backward_by_torch_grouped_gemm_agrees_with_the_loop(counts):
    """What CUDA runs where experts are a step of autograd themselves; here on the CPU."""
    E, D, H = len(counts), 16, 24
    x, w1, w2 = grouped(counts, D, torch.float32).detach(), random(E, 2 * H, D), random(E, D, H)
    w1, w2 = w1.detach(), w2.detach()
    ends = aligned(torch.tensor(counts)).cumsum(0).tolist()
    x = x[: ends[-1]]
    grad = (x != 0) * random(*x.shape, seed=3, grad=False)
    y, hidden = grouped_gemm.forward_groups(x, w1, w2, ends)
    wanted = [y, torch.empty_like(w1), torch.empty_like(w2)]
    wanted.append(grouped_gemm.backward_groups(grad, x, w1, w2, hidden, ends, into=wanted[1:3]))
    y, hidden = grouped_gemm._grouped_forward(x, w1, w2, ends)
    found = [y, torch.zeros_like(w1), torch.zeros_like(w2)]
    found.append(grouped_gemm._grouped_backward(grad, x, w1, w2, hidden, ends, found[1:3]))
    for a, b in zip(found, wanted):
        assert distance(a, b) <= TOLERANCE[torch.float32]
