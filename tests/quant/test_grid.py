"""Grids against values written down by hand, against brute force, and their own promises (T36)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.quant.grid import Grid, GridKind, Quantized, divisor_of, round_to_nearest

KINDS = list(GridKind)
FP6 = [GridKind.fp6_e3m2, GridKind.fp6_e2m3]
GRIDS = [(kind, True) for kind in KINDS] + [(GridKind.int4, False), (GridKind.int8, False)]


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * 0.05


def test_values_of_fp6_are_those_of_the_formats() -> None:
    e3m2, e2m3 = (Grid(kind).values() for kind in FP6)
    assert e3m2[:8].tolist() == [0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375]
    assert e3m2[28:32].tolist() == [16, 20, 24, 28] and e3m2[63] == -28
    assert e2m3[:9].tolist() == [0.125 * i for i in range(8)] + [1.0]
    assert e2m3[31] == 7.5 and (e2m3 * 8 == (e2m3 * 8).round()).all()
    assert all((v[:32].diff() > 0).all() and (v[32:] == -v[:32]).all() for v in (e3m2, e2m3))


@pytest.mark.parametrize("kind", FP6)
def test_fp6_codes_are_the_nearest_and_ties_go_to_the_even_code(kind: GridKind) -> None:
    grid = Grid(kind, 0, scale_dtype=torch.float32)
    values = grid.values()[:32]
    ties = (values[1:] + values[:-1]) / 2
    w = torch.cat([values, -values, ties, -ties, weights(1, 4000)[0] * 100]).clamp(-60, 60)
    codes = grid.encode(w[None], torch.ones(1, 1))[0]
    found = grid.values()[codes.long()]
    distance = (w[:, None] - grid.values()).abs()
    assert torch.equal((w - found).abs(), distance.amin(1))
    is_tie = torch.isin(w.abs(), ties)
    assert (codes[is_tie] % 2 == 0).all() and int(is_tie.sum()) >= 62
    assert codes[32] == 0  # minus zero


@pytest.mark.parametrize("kind", [GridKind.int4, GridKind.int8])
def test_symmetric_integers_are_the_published_grid(kind: GridKind) -> None:
    """scale = 2 absmax / (2^b - 1), zero = 2^(b-1), codes clamped (spec of M32's export)."""
    grid = Grid(kind, 32, scale_dtype=torch.float32)
    w = weights(8, 128)
    found = round_to_nearest(w, grid)
    most = 2**grid.bits - 1
    scale = 2 * w.view(8, 4, 32).abs().amax(-1) / most
    assert torch.equal(found.scale_NG, scale) and found.zero_NG is None
    wide = scale.repeat_interleave(32, 1)
    codes = torch.clamp(torch.round(w / wide) + 2 ** (grid.bits - 1), 0, most)
    assert torch.equal(found.codes_NK.float(), codes)
    assert torch.equal(found.dequantize(), wide * (codes - 2 ** (grid.bits - 1)))


@pytest.mark.parametrize("kind, is_symmetric", GRIDS)
@given(
    n=st.integers(1, 5),
    k=st.integers(1, 70),
    group=st.sampled_from([0, 1, 7, 16, 32]),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_codes_come_back_and_errors_are_bounded(
    kind: GridKind, is_symmetric: bool, n, k, group, scale, dtype, seed
) -> None:
    grid = Grid(kind, group, is_symmetric, dtype)
    w = weights(n, k, seed) * scale
    found = round_to_nearest(w, grid)
    assert found.codes_NK.shape == w.shape and found.scale_NG.shape == (n, grid.num_groups(k))
    assert int(found.codes_NK.max()) < 2**grid.bits
    near = found.dequantize()
    again = grid.encode(near, found.scale_NG, found.zero_NG)
    kept = grid.decode(again, found.scale_NG, found.zero_NG)
    assert torch.equal(kept, near)  # the grid's own points stay where they are
    wide = found.scale_NG.float().repeat_interleave(group or k, 1)[:, :k]
    # A rounded scale may put the end of the range outside by as much as it was rounded.
    slack = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-22}[dtype]
    reach = 2**grid.bits if grid.is_int else grid.largest
    bound = (grid.worst_error + 0.5 * (not is_symmetric) + reach * slack) * wide
    assert ((near - w).abs() <= bound * (1 + 1e-5) + 6e-8 * reach).all()


@pytest.mark.parametrize("kind, is_symmetric", GRIDS)
def test_searched_scales_never_lose_by_the_measure_they_are_searched_by(
    kind: GridKind, is_symmetric: bool
) -> None:
    grid = Grid(kind, 32, is_symmetric)
    w = weights(16, 96) * (1 + weights(16, 96, seed=1).abs() * 40)
    importance = weights(1, 96, seed=2)[0].abs() ** 3
    plain, searched = (grid.scales(w, importance, num) for num in (0, 24))

    def error(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        gap = (grid.fake(w, scale, zero) - w).square() * importance
        return gap.view(16, 3, 32).sum(-1)

    before, after = error(*plain), error(*searched)
    assert (after <= before).all()
    assert after.sum() < (0.97 if grid.bits < 8 else 0.999) * before.sum()


@pytest.mark.parametrize("kind, is_symmetric", GRIDS)
def test_zeros_tiny_and_hopeless_weights(kind: GridKind, is_symmetric: bool) -> None:
    grid = Grid(kind, 16, is_symmetric)
    w = weights(3, 48)
    w[0, :16] = 0
    w[1] = 1e-12  # its scale underflows fp16
    near = round_to_nearest(w, grid).dequantize()
    assert (near[0, :16] == 0).all() and (near[1] == 0).all() and near[2].abs().max() > 0
    for bad in (math.inf, math.nan, 1e9):
        w[2, 5] = bad
        with pytest.raises(ValueError, match="not finite"):
            grid.scales(w)


@pytest.mark.parametrize(("kind", "is_symmetric"), GRIDS)
def test_the_nearest_weight_is_that_of_its_code(kind: GridKind, is_symmetric: bool) -> None:
    """With scales of both signs and none."""
    grid = Grid(kind, 32, is_symmetric)
    w = weights(6, 128) * 3
    plain = round_to_nearest(weights(6, 128), grid)
    scale = plain.scale_NG * torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 1.0])[:, None]
    scale = scale.to(grid.scale_dtype)
    wide, zero = grid.spread(scale, plain.zero_NG, 128)
    found = grid.nearest(w, wide, divisor_of(wide), zero)
    assert torch.equal(found, grid.fake(w, scale, plain.zero_NG))
    assert not found[2].any() and all(row.any() for row in found[[0, 1, 3, 4, 5]])


def test_a_negative_scale_turns_the_grid_to_the_largest_weight() -> None:
    """int4 reaches 8 steps on one side: an outlier of either sign costs no clamping."""
    grid = Grid(GridKind.int4, 0, scale_dtype=torch.float32)
    row = torch.cat([torch.arange(-7, 8), torch.tensor([8.0])])
    w = torch.stack([row, -row])
    scale, _ = grid.scales(w, num_candidates=113)  # 7.5 / 8 of the plain scale is among these
    error = (grid.fake(w, scale) - w).abs().amax(1)
    assert float(scale[0]) < 0 < float(scale[1]) and float(error.max()) < 0.05


def test_size_counts_codes_scales_and_zeros() -> None:
    w = weights(32, 256)
    sizes = {
        grid: round_to_nearest(w, grid).size_bytes
        for grid in (Grid(GridKind.int4, 128), Grid(GridKind.int4, 128, False), Grid(FP6[0], 0))
    }
    assert list(sizes.values()) == [
        32 * 128 + 2 * 32 * 2,
        32 * 128 + 2 * 32 * 2 + 32,
        32 * 192 + 32 * 2,
    ]


def test_gaussian_weights_lose_what_the_spec_measured() -> None:
    """Relative error of weights, group 128: int4 11 %, E2M3 2.8 %."""
    w = weights(64, 1024)
    for kind, expected in ((GridKind.int4, 0.11), (GridKind.fp6_e2m3, 0.028)):
        found = round_to_nearest(w, Grid(kind, 128))
        assert isinstance(found, Quantized)
        error = float((found.dequantize() - w).norm() / w.norm())
        assert abs(error / expected - 1) < 0.15, error
