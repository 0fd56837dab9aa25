"""Chunked cross entropy of torch against the plain one, and the memory it promises; the compiled
one is in test_loss_native.py."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptm.kernels import loss, native
from ptm.kernels.loss import (
    IGNORED,
    chunk_tokens,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from tests.support.compare import TOLERANCE, assert_same_maths, distance, random


@pytest.fixture(autouse=True)
def by_torch():
    with native.forced(None):
        yield


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 tokens and slices of 3, so that few tokens make several of both."""
    monkeypatch.setattr(loss, "LEAST_CHUNK", 16)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(loss, "SLICE_LOGITS", 300)


def labels_for(T: int, V: int, masked: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(T)
    labels = torch.randint(V, (T,), generator=generator)
    if masked == "some":
        labels[torch.rand(T, generator=generator) < 0.4] = IGNORED
    return labels.fill_(IGNORED) if masked == "all" else labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [0, 1, 16, 53])
@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_agrees_with_the_plain_loss(T, masked, dtype, small_chunks):
    x, weight = random(T, 12, dtype=dtype), random(100, 12, dtype=dtype)
    labels = labels_for(T, 100, masked)
    assert_same_maths(
        lambda x, w: linear_cross_entropy(x, w, labels),
        lambda x, w: linear_cross_entropy_reference(x, w, labels),
        [x, weight],
        grad=torch.tensor(0.25),
    )


def test_the_sum_is_fp32_even_of_bf16_logits(small_chunks):
    x, weight = random(53, 12, dtype=torch.bfloat16), random(100, 12, dtype=torch.bfloat16)
    labels = labels_for(53, 100, "some")
    found = linear_cross_entropy(x, weight, labels)
    assert found.dtype == torch.float32
    if loss.is_widened(x):
        x, weight = x.float(), weight.float()
    expected = linear_cross_entropy_reference(x, weight, labels)
    assert distance(found, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("T", [0, 1, 53])
def test_without_products_of_bf16_rows_and_words_are_widened(T, small_chunks, monkeypatch):
    monkeypatch.setattr(loss, "WIDE_WEIGHTS", 12 * 30)  # words in several parts
    monkeypatch.setattr(loss, "is_widened", lambda x: True)
    x, weight = random(T, 12, dtype=torch.bfloat16), random(100, 12, dtype=torch.bfloat16)
    labels = labels_for(T, 100, "some")
    found = linear_cross_entropy(x, weight, labels)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = linear_cross_entropy_reference(*wide, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
    grads = torch.autograd.grad(found, [x, weight]), torch.autograd.grad(expected, wide)
    for a, b in zip(*grads, strict=True):
        assert a.dtype is torch.bfloat16 and (a - b).norm() <= 2.5e-3 * b.norm()


def test_all_masked_is_zero_with_gradients_of_zero():
    x, weight = random(9, 4), random(11, 4)
    total = linear_cross_entropy(x, weight, torch.full((9,), IGNORED))
    total.backward()
    assert total.item() == 0.0
    assert not x.grad.any() and not weight.grad.any()


def test_an_impossible_label_costs_its_true_price():
    x, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [500.0]])
    assert linear_cross_entropy(x, weight, torch.tensor([0])).item() == pytest.approx(500.0)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest result."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("with_grad", [True, False])
def test_never_holds_the_logits_of_more_than_one_chunk(small_chunks, with_grad):
    T, V, D = 200, 100, 4
    x, weight = random(T, D, grad=with_grad), random(V, D, grad=with_grad)
    with LargestTensor() as seen:
        total = linear_cross_entropy(x, weight, labels_for(T, V, "some"))
        if with_grad:
            total.backward()
    assert seen.largest == chunk_tokens(V) * V < T * V


@pytest.mark.parametrize("vocab_size", [1024, 8192, 135_040])
def test_chunks_stay_within_bounds(vocab_size):
    assert chunk_tokens(vocab_size) * vocab_size * 2 <= 2**27  # bytes of bf16 logits
    assert chunk_tokens(vocab_size) >= 256
