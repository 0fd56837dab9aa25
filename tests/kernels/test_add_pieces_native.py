"""Pieces of a gradient added up in one visit, against torch's additions one after another."""

from __future__ import annotations

import math

import pytest
import torch

from ptm.common.errors import KernelError
from ptm.kernels import native
from ptm.kernels.pieces import add_pieces, add_pieces_norms, sum_pieces
from tests.support.native import each_isa, needs_library, poisoned, same_bits

CHUNK = 16_384
SIZES = [1, 7, 16, 100, 16_384, 40_001]


def _cases(num_pieces: int, size: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(size + num_pieces)
    wide = torch.randn(num_pieces, size + 24, generator=generator).to(dtype)
    total = torch.randn(size + 3, generator=generator)[3:]
    return total, wide[:, 5 : 5 + size]  # of wider rows, not aligned


def _by_hand(total, pieces, replaces):
    """Sums of an element in the order of ranks; what was there is added last."""
    found = pieces[0].float()
    for piece in pieces[1:]:
        found = found + piece.float()
    return found if replaces else total + found


def _check(num_pieces, size, replaces, dtype):
    total, pieces = _cases(num_pieces, size, dtype)
    wanted = _by_hand(total, pieces, replaces)
    found = total.clone()
    add_pieces(found, pieces, replaces=replaces)
    assert torch.equal(found, wanted)
    for chunk in (CHUNK, 4 * CHUNK):
        found = total.clone()
        norms = add_pieces_norms(found, pieces, replaces=replaces, chunk=chunk)
        assert torch.equal(found, wanted) and norms.dtype is torch.float64
        exact = [math.fsum(x * x for x in part.tolist()) for part in wanted.double().split(chunk)]
        assert norms.tolist() == pytest.approx([math.sqrt(square) for square in exact], rel=1e-13)
    assert torch.equal(sum_pieces(pieces).float(), _by_hand(total, pieces, True))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize("num_pieces", [1, 2, 3, 5])
def test_bits_are_those_of_one_addition_after_another(isa, num_pieces, replaces, dtype):
    for size in SIZES:
        with native.forced(isa), poisoned():
            _check(num_pieces, size, replaces, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("replaces", [True, False])
def test_without_a_kernel_too(replaces, dtype):
    with native.forced(None):
        _check(3, 100, replaces, dtype)


@needs_library
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_tells_what_is_not_finite(bad):
    pieces = torch.ones(2, 1000)
    pieces[1, 999] = bad
    norms = add_pieces_norms(torch.empty(1000), pieces, replaces=True, chunk=CHUNK)
    assert norms.shape == (1,) and not norms.isfinite()


@needs_library
def test_norms_are_the_same_on_any_number_of_threads():
    total, pieces = _cases(2, 100_001, torch.bfloat16)
    for chunk in (CHUNK, 8 * CHUNK):
        same_bits(
            lambda n=chunk: [add_pieces_norms(total.clone(), pieces, replaces=False, chunk=n)]
        )


@needs_library
def test_a_chunk_that_parts_do_not_fill_is_refused():
    with pytest.raises(KernelError, match="add_pieces: shapes it cannot do"):
        add_pieces_norms(torch.empty(8), torch.ones(1, 8), replaces=True, chunk=1000)
