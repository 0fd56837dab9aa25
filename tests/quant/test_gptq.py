"""The solver against a GPTQ in float64 that is written from the paper, and its invariants (T37)."""

from __future__ import annotations

import math

import pytest
import torch

from ptm.quant.gptq import GptqOptions, Hessian, factorize, relative_error, solve
from ptm.quant.grid import Grid, GridKind, round_to_nearest

PLAIN = GptqOptions(is_ordered=False, candidates=0, descents=0)
GRIDS = [
    Grid(GridKind.int4, 32),
    Grid(GridKind.int4, 32, is_symmetric=False),
    Grid(GridKind.int8, 64),
    Grid(GridKind.fp6_e3m2, 0),
    Grid(GridKind.fp6_e2m3, 32),
]
IDS = [f"{g.kind}-{g.group}-{'sym' if g.is_symmetric else 'asym'}" for g in GRIDS]


def workload(n: int = 48, k: int = 96, t: int = 800, seed: int = 0):
    """Weights with heavy tails; inputs that are correlated and of unequal size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) / math.sqrt(k) + 0.3 * torch.eye(k)
    sizes = torch.rand(k, generator=g) ** 3 + 0.05
    x, held_out = (torch.randn(t, k, generator=g) @ mix * sizes for _ in range(2))
    w = torch.randn(n, k, generator=g) * torch.rand(n, 1, generator=g).add(0.1) * 0.05
    w *= 1 + 3 * (torch.rand(n, k, generator=g) > 0.98)
    return w, x, held_out


def hessian(x: torch.Tensor) -> torch.Tensor:
    found = Hessian(x.shape[1])
    found.add(x)
    return found.mean()


def by_the_paper(w: torch.Tensor, h: torch.Tensor, grid: Grid, damping: float) -> torch.Tensor:
    """Weights after optimal brain quantization in the given order, by the update of the inverse."""
    w, h = w.double().clone(), h.double()
    scale, zero = grid.scales(w.float())
    inverse = torch.linalg.inv(h + damping * h.diagonal().mean() * torch.eye(len(h)))
    size = grid.group or w.shape[1]
    for k in range(w.shape[1]):
        g = slice(k // size, k // size + 1)
        whole = Grid(grid.kind, 0, grid.is_symmetric)
        near = whole.fake(
            w[:, k : k + 1].float(), scale[:, g], None if zero is None else zero[:, g]
        )
        error = (w[:, k] - near[:, 0]) / inverse[k, k]
        w[:, k + 1 :] -= error[:, None] * inverse[k, k + 1 :]
        w[:, k] = near[:, 0].double()
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return w.float()


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_sweep_is_that_of_the_paper(grid: Grid) -> None:
    w, x, _ = workload()
    h = hessian(x)
    found = solve(w, factorize(h, PLAIN), grid, PLAIN)
    expected = by_the_paper(w, h, grid, PLAIN.damping)
    near = found.quantized.dequantize()
    # A code next to a tie may fall either way in fp32, and moves what comes after it.
    assert (near == expected).float().mean() > 0.98
    loss = relative_error(w, expected, h)
    assert found.error == pytest.approx(loss, rel=0.01)
    assert torch.equal(found.quantized.scale_NG, round_to_nearest(w, grid).scale_NG)


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_each_step_lowers_the_error_and_holds_on_other_text(grid: Grid) -> None:
    w, x, held_out = workload()
    h, other = hessian(x), hessian(held_out)
    steps = [
        round_to_nearest(w, grid),
        *(
            solve(w, factorize(h, options), grid, options).quantized
            for options in (PLAIN, GptqOptions(descents=0), GptqOptions())
        ),
    ]
    seen, unseen = ([relative_error(w, step.dequantize(), m) for step in steps] for m in (h, other))
    assert seen == sorted(seen, reverse=True) and seen[-1] < 0.7 * seen[0], seen
    assert unseen[-1] < 0.8 * unseen[0], unseen


def test_descent_stops_where_no_single_code_can_be_better() -> None:
    w, x, _ = workload(8, 32)
    h = hessian(x)
    grid, options = Grid(GridKind.int4, 16), GptqOptions(descents=50)
    factor = factorize(h, options)
    found = solve(w, factor, grid, options).quantized

    def loss(codes: torch.Tensor) -> torch.Tensor:
        gap = grid.decode(codes, found.scale_NG) - w
        return ((gap @ factor.damped_KK) * gap).sum(1)

    best = loss(found.codes_NK)
    for k in range(32):
        for move in (-1, 1):
            codes = found.codes_NK.clone().int()
            codes[:, k] = (codes[:, k] + move).clamp(0, 15)
            assert (loss(codes.to(torch.uint8)) >= best - 1e-9).all()


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_dead_inputs_keep_the_nearest_code_and_nothing_is_divided_by_zero(grid: Grid) -> None:
    w, x, _ = workload()
    x[:, [3, 40, 41, 95]] = 0
    found = solve(w, factorize(hessian(x)), grid)
    assert found.num_dead == 4
    near = found.quantized
    nearest = grid.encode(w, near.scale_NG, near.zero_NG)
    dead = [3, 40, 41, 95]
    assert torch.equal(near.codes_NK[:, dead], nearest[:, dead])
    assert near.dequantize()[:, dead].abs().max() > 0
    assert math.isfinite(found.error)


def test_no_text_at_all_is_rounding_to_nearest() -> None:
    w, _, _ = workload()
    grid = GRIDS[0]
    options = GptqOptions(candidates=0)
    found = solve(w, factorize(torch.zeros(96, 96), options), grid, options)
    assert torch.equal(found.quantized.codes_NK, round_to_nearest(w, grid).codes_NK)
    assert found.error == 0


def test_damping_is_raised_until_it_works_and_said() -> None:
    w, x, _ = workload(t=4)  # rank 4 of 96
    h = hessian(x)
    h -= 0.05 * h.diagonal().mean() * torch.eye(96)  # a negative eigenvalue, as rounding makes
    found = solve(w, factorize(h), GRIDS[0])
    assert found.damping in (0.05, 0.5) and math.isfinite(found.error)
    h[0, 1] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        factorize(h)


def test_hessian_is_a_sum_that_may_be_made_in_parts() -> None:
    _, x, _ = workload(t=1500)
    whole, parts = Hessian(96), Hessian(96)
    whole.add(x.view(3, 500, 96))
    parts.add(x[:700])
    parts.add(x[700:])
    exact = x.double().t() @ x.double() / 1500
    for found in (whole, parts):
        assert found.num_rows == 1500
        assert torch.equal(found.mean(), found.mean().t())
        assert (found.mean() - exact).norm() < 1e-6 * exact.norm()
    rounded, x = Hessian(96), x.bfloat16()
    rounded.add(x)
    exact = x.double().t() @ x.double() / 1500
    assert (rounded.mean() - exact).norm() < 1e-6 * exact.norm(), "products of bf16 are exact"


def test_codes_do_not_depend_on_threads() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3000, 512, generator=g) * torch.rand(512, generator=g)
    w, cross = torch.randn(96, 512, generator=g), 0.01 * torch.randn(512, 512, generator=g)
    options, before, found = GptqOptions(alpha=0.5), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sums = Hessian(512)
            sums.add(x.bfloat16())
            sums.add(x)
            made = solve(w, factorize(sums.mean(), options), GRIDS[0], options, cross_KK=cross)
            assert torch.get_num_threads() == threads
            found.append((made.quantized, made.error))
    finally:
        torch.set_num_threads(before)
    for other, error in found[1:]:
        assert torch.equal(other.codes_NK, found[0][0].codes_NK) and error == found[0][1]
        assert torch.equal(other.scale_NG, found[0][0].scale_NG)


def test_gptaq_keeps_the_outputs_of_the_whole_model_better() -> None:
    """Inputs x come from quantized layers, x_fp from the others: what counts is W x_fp."""
    w, x_fp, _ = workload(t=4000)
    g = torch.Generator().manual_seed(5)
    x = x_fp + 0.3 * x_fp.std() * torch.randn(x_fp.shape, generator=g) * (x_fp[:, :1] > 0)
    h, cross = hessian(x), (x_fp - x).t() @ x / len(x)
    lost = {}
    for alpha in (0.0, 1.0):
        options = GptqOptions(alpha=alpha)
        near = solve(w, factorize(h, options), GRIDS[0], options, cross_KK=cross)
        lost[alpha] = float((x @ near.quantized.dequantize().t() - x_fp @ w.t()).norm())
    assert lost[1.0] < 0.97 * lost[0.0], lost


def test_inputs_in_bf16_with_a_few_large_directions_need_no_more_damping() -> None:
    """Where products of bf16 are rounded to bf16, that alone makes the matrix indefinite, and the
    damping that mends it is ten times as much."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -3, 256)
    sizes[:4] = 20.0
    turn = torch.linalg.qr(torch.randn(256, 256, generator=draw))[0]
    x = ((torch.randn(8192, 256, generator=draw) * sizes) @ turn).bfloat16()
    hessian = Hessian(256)
    hessian.add(x)
    exact = x.double().t() @ x.double() / len(x)
    assert float((hessian.mean() - exact).norm() / exact.norm()) < 1e-6
    assert factorize(hessian.mean()).damping == GptqOptions().damping
