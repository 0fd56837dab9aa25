"""GPTQ's compiled loops against the torch that specifies them, bit for bit, and its products of
bf16 against fp64, on every instruction set here."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from ptm.kernels import gptq as kernels
from ptm.kernels import native
from ptm.quant.gptq import (
    BLOCK,
    GptqOptions,
    Hessian,
    Solved,
    add_products,
    factorize,
    solve,
)
from ptm.quant.grid import Grid, GridKind
from tests.support.native import each_isa, poisoned, same_bits

GRIDS = [Grid(kind, group) for kind in GridKind for group in (0, 32, 128)]
GRIDS += [Grid(kind, group, False) for kind in (GridKind.int4, GridKind.int8) for group in (0, 64)]
GRIDS += [Grid(GridKind.int4, 32, scale_dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
SHAPES = [(1, 7), (70, 96), (300, 200), (64, 300)]  # ragged tiles of outputs, blocks and groups


@functools.cache
def workload(num_outputs: int, num_inputs: int, seed: int = 0):
    """Weights with heavy tails and a row of zeros; inputs correlated, of unequal size, two dead."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_inputs, num_inputs, generator=g) / num_inputs**0.5
    x = torch.randn(2 * num_inputs + 50, num_inputs, generator=g) @ (mix + torch.eye(num_inputs))
    x *= torch.rand(num_inputs, generator=g) ** 3 + 0.05
    x[:, [1, num_inputs // 2]] = 0
    w = torch.randn(num_outputs, num_inputs, generator=g) * 0.05
    w *= 1 + 5 * (torch.rand(w.shape, generator=g) > 0.98)
    w[num_outputs // 2 :][:1] = 0
    hessian = Hessian(num_inputs)
    hessian.add(x)
    return w, factorize(hessian.mean())


@functools.cache
def expected_of(grid: Grid, shape: tuple[int, int], options: GptqOptions) -> Solved:
    w, factor = workload(*shape)
    with native.forced(None):
        return solve(w, factor, grid, options)


def same(found: Solved, expected: Solved) -> bool:
    ours, theirs = found.quantized, expected.quantized
    zeros = zip(*((q.zero_NG,) for q in (ours, theirs) if q.zero_NG is not None), strict=True)
    pairs = [(ours.codes_NK, theirs.codes_NK), (ours.scale_NG, theirs.scale_NG), *zeros]
    return found.error == expected.error and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs
    )


@each_isa
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_codes_are_the_references(isa, grid, monkeypatch):
    called = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda op, *args: (called.append(op), call(op, *args)))
    for shape in SHAPES:
        w, factor = workload(*shape)
        for options in (GptqOptions(), GptqOptions(descents=0, candidates=0)):
            expected = expected_of(grid, shape, options)
            assert not called
            with native.forced(isa), poisoned():
                found = solve(w, factor, grid, options)
            assert same(found, expected), (shape, options)
            blocks = -(-shape[1] // BLOCK)
            assert called.count("gptq_sweep") == blocks
            assert called.count("gptq_descend") % blocks == 0
            assert ("gptq_descend" in called) == ("gptq_errors" in called) == bool(options.descents)
            called.clear()


@each_isa
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_block_has_the_references_bits(isa, grid, monkeypatch):
    """Slopes and errors too, with which torch goes on."""
    from ptm.quant.gptq import _Columns

    w, factor = workload(75, 200)
    scale, zero = grid.scales(w)
    order = torch.arange(3, 3 + 100).flip(0)
    block = slice(100, 200)
    slope = torch.randn(100, 75, generator=torch.Generator().manual_seed(1)) * 0.01

    def run() -> list[torch.Tensor]:
        columns, near = _Columns(grid, scale, zero, 200), torch.zeros(200, 75)
        errors = columns.sweep(w.t()[order].contiguous(), factor.root_KK[block, block], order, near)
        slopes, hessian = slope.clone(), factor.damped_KK[block, block]
        moved = columns.descend(slopes, hessian, factor.dead_K[block], near[block], 100)
        still = columns.descend(0 * slope, hessian, factor.dead_K[block], near[block], 100)
        return [errors, near, slopes, torch.tensor([moved, still])]

    with native.forced(None):
        expected = run()
    assert expected[3].tolist() == [True, False]
    with native.forced(isa):
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)
        same_bits(run)


@each_isa
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_errors_of_scales_are_the_references(isa, grid):
    for N, K in itertools.product((1, 40), (7, 96, 300)):
        w, _ = workload(N, K)
        importance = torch.rand(K, generator=torch.Generator().manual_seed(2))
        scale, zero = grid.scales(w)
        tried = [scale, -scale, scale * 1.5, scale * 0], [zero] * 4
        with native.forced(None):
            expected = grid.errors(w, importance, *tried)
        with native.forced(isa), poisoned():
            assert torch.equal(grid.errors(w, importance, *tried), expected)
            exact = (grid.fake(w, scale, zero).double() - w).square() * importance
        assert torch.allclose(expected[0].sum(1).double(), exact.sum(1), rtol=1e-5)


@each_isa
@pytest.mark.parametrize("T, M, N", [(0, 32, 32), (1, 32, 96), (31, 64, 32), (1100, 544, 288)])
def test_products_of_bf16_are_exact_sums(isa, T, M, N):
    """Within the rounding of fp32 sums, and the same bits twice and on any number of threads."""
    g = torch.Generator().manual_seed(T)
    a, b = (torch.randn(T, width, generator=g).bfloat16() for width in (M, N))
    before = torch.randn(M, N, generator=g), torch.randn(M, M, generator=g)

    def run() -> list[torch.Tensor]:
        sums = [x.clone() for x in before]
        add_products(a, b, sums[0])
        add_products(a, a, sums[1])
        return [sums[0], sums[1].triu()]

    with native.forced(isa), poisoned():
        assert kernels.multiplies(a, b) == native.has("gptq_products")
        found = run()
        same_bits(run)
    for x, left, right, start in zip(found, (a, a), (b, a), before, strict=True):
        left, right = left.double(), right.double()
        exact = left.t() @ right + start
        bound = (left.abs().t() @ right.abs() + start.abs()) * 2**-19
        off = (x - exact).abs() > bound
        assert not bool((off.triu() if right.equal(left) else off).any())


def test_products_of_other_rows_go_to_torch():
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert not kernels.multiplies(x.float(), x.float())
    assert not kernels.multiplies(x[:, :33], x)
    strided = torch.randn(40, 128).bfloat16()[:, ::2]
    found = torch.zeros(64, 64)
    add_products(strided, strided, found)
    exact = (strided.double().t() @ strided.double()).triu()
    assert torch.allclose(found.triu().double(), exact, atol=1e-4)


def test_other_types_and_devices_go_to_torch():
    assert not kernels.serves(torch.zeros(4, 4, dtype=torch.float64))
    assert not kernels.serves(torch.zeros(4, 4, device="meta"))
    with native.forced(None):
        assert not kernels.serves(torch.zeros(4, 4))
