"""What the home of tokens does with rows in windows, by kernels and by torch, bit for bit; and
where the windows lie."""

import pytest
import torch

from ptm.kernels import native
from ptm.kernels.moe_ep_mlp import Windows, added, combined, rows_for, spread, window_bytes
from ptm.kernels.permute import combine, permute
from tests.support.native import each_isa, poisoned, same_bits

BF16 = torch.bfloat16
SHAPES = {
    "no tokens": (0, 2, 32),
    "one token": (1, 2, 32),
    "one expert": (9, 1, 64),
    "odd numbers": (77, 3, 37),
    "parts": (200, 2, 96),
}


def draw(*shape: int, seed: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(T: int, A: int, D: int) -> list[torch.Tensor]:
    """rows (T, A, D), weights (T, A) and the gradient (T, D)."""
    weights = draw(T, A, seed=1, dtype=torch.float32)
    return [draw(T, A, D, seed=0), weights, draw(T, D, seed=2)]


def by_kernels(rows: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    kept, to = torch.empty_like(rows), torch.empty_like(rows)
    y = combined(rows, weights, kept_TAD=kept)
    by_weights = spread(grad, weights, kept, to_TAD=to).sum(-1, dtype=weights.dtype)
    return [y, kept, to, by_weights, added(to)]


def by_torch(rows: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    T, A, D = rows.shape
    place, flat = torch.arange(T * A).view(T, A), rows.reshape(T * A, D).requires_grad_()
    weights = weights.clone().requires_grad_()
    y = combine(flat, place, weights)
    to, by_weights = torch.autograd.grad(y, [flat, weights], grad)
    x = torch.zeros(T, D, dtype=BF16, requires_grad=True)
    (by_x,) = torch.autograd.grad(permute(x, place, T * A), [x], to)
    return [y.detach(), rows, to.view(T, A, D), by_weights, by_x]


@each_isa
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_bits_are_those_of_torch(isa, shape):
    expected = by_torch(*inputs(*shape))
    with native.forced(isa), poisoned():
        found = by_kernels(*inputs(*shape))
        without = combined(*inputs(*shape)[:2], kept_TAD=None)
    for what, a, b in zip(("y", "kept", "rows", "weights", "x"), found, expected, strict=True):
        assert torch.equal(a, b), what
    assert torch.equal(without, expected[0])


@each_isa
def test_tiny_numbers_are_not_lost(isa):
    rows, weights, grad = inputs(33, 2, 64)
    with native.forced(isa):
        found = by_kernels(rows, weights * 1e-38, grad)
    wide = rows.float() * (weights * 1e-38).bfloat16().float()[:, :, None]
    assert torch.equal(found[0], (wide[:, 0].bfloat16().float() + wide[:, 1]).bfloat16())
    assert found[0].any(1).all()


@each_isa
def test_the_same_bits_for_any_number_of_threads(isa):
    case = inputs(611, 2, 96)
    with native.forced(isa):
        same_bits(lambda: by_kernels(*case))


def test_windows_of_all_ranks_are_one_matrix():
    assert [rows_for(n) for n in (0, 1, 64, 65)] == [64, 64, 64, 128]
    memory = torch.zeros(window_bytes(3, 64, 2, 32), dtype=torch.uint8)
    windows = Windows(memory, 3, 64, 2, 32)
    windows.x_of(1, 5).fill_(1)
    windows.rows_of(2, 7).fill_(2)
    windows.ids_of(0, 3).fill_(3)
    assert windows.x_MD.any(1).nonzero().flatten().tolist() == list(range(64, 69))
    assert windows.rows_ND.any(1).nonzero().flatten().tolist() == list(range(256, 270))
    assert windows.ids_WS.flatten().nonzero().flatten().tolist() == list(range(6))
    assert windows.holds(64, 2, 32) and not windows.holds(65, 2, 32)
    assert not windows.holds(1, 3, 32) and not windows.holds(1, 2, 64)
    assert memory.data_ptr() == windows.x_MD.data_ptr()
