"""Products with quantized weights against fp64, on every instruction set here, and layouts that are
exact."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ptm.kernels import native
from ptm.kernels.quant_linear import (
    PackedWeight,
    pack,
    regrouped,
    stack,
    unpack,
    wq_linear,
    wq_linear_reference,
    wq_moe,
    wq_moe_reference,
)
from ptm.quant.grid import Grid, GridKind, Quantized, round_to_nearest
from ptm.quant.modules import QuantExperts
from tests.support.native import each_isa, error, needs_library, poisoned, same_bits

GRIDS = [
    Grid(GridKind.int4, 128),
    Grid(GridKind.int4, 32, is_symmetric=False),
    Grid(GridKind.int4, 0, is_symmetric=False, scale_dtype=torch.float32),
    Grid(GridKind.int8, 64, is_symmetric=False, scale_dtype=torch.bfloat16),
    Grid(GridKind.int8, 0),
    Grid(GridKind.fp6_e3m2, 64),
    Grid(GridKind.fp6_e2m3, 0, scale_dtype=torch.float32),
]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}  # fp32 sums; bf16: one rounding, 2^-9
each_grid = pytest.mark.parametrize(
    "grid", GRIDS, ids=lambda g: f"{g.kind}-{g.group}-{g.is_symmetric}"
)


def drawn(N: int, K: int, grid: Grid, seed: int = 0) -> tuple[PackedWeight, Quantized]:
    draw = torch.Generator().manual_seed(seed)
    q = round_to_nearest(torch.randn(N, K, generator=draw) + 0.2, grid)
    q.scale_NG[1::2] *= -1  # as searched scales of int4 may be
    values = None if grid.is_int else grid.values()
    packed = pack(q.codes_NK, q.scale_NG, q.zero_NG, bits=grid.bits, group=grid.group,
                  values=values)  # fmt: skip
    return packed, q


def rows(*shape: int, dtype=torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@each_grid
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (37, 200), (64, 576)], ids=str)
def test_packing_is_exact_and_compact(grid, shape):
    packed, q = drawn(*shape, grid)
    assert torch.equal(unpack(packed), q.dequantize())
    if shape == (64, 576):
        padded = q.scale_NG.numel() * (4 if grid.scale_dtype is not torch.float16 else 2)
        zeros = 0 if q.zero_NG is None else q.zero_NG.numel()
        assert packed.size_bytes == 64 * 576 * grid.bits // 8 + padded + zeros


def test_every_code_survives():
    for grid in GRIDS:
        codes = torch.arange(2**grid.bits, dtype=torch.uint8).repeat(16, 2)
        G = grid.num_groups(codes.shape[1])
        zero = None if grid.is_symmetric else torch.full((16, G), 3, dtype=torch.uint8)
        q = Quantized(grid, codes, torch.full((16, G), 0.37).to(grid.scale_dtype), zero)
        values = None if grid.is_int else grid.values()
        packed = pack(codes, q.scale_NG, zero, bits=grid.bits, group=grid.group, values=values)
        assert torch.equal(unpack(packed), q.dequantize())


@each_isa
@each_grid
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_the_product_with_unpacked_weights(isa, grid, dtype):
    with native.forced(isa), poisoned():
        for T, N, K in [(0, 16, 32), (1, 48, 256), (2, 37, 200), (3, 5, 7), (9, 33, 64),
                        (17, 50, 300), (150, 70, 290)]:  # fmt: skip
            packed, q = drawn(N, K, grid)
            x = rows(T, K, dtype=dtype)
            expected = x.double() @ q.dequantize().double().t()
            found = wq_linear(x, packed)
            assert found.dtype is dtype and error(found, expected) <= BOUND[dtype], (T, N, K)


@each_isa
@each_grid
def test_long_rows(isa, grid):
    for T, N, K in [(1, 33, 2336), (5, 17, 1100)]:
        packed, q = drawn(N, K, grid)
        x = rows(T, K, dtype=torch.float32)
        expected = x.double() @ q.dequantize().double().t()
        with native.forced(isa), poisoned():
            assert error(wq_linear(x, packed), expected) <= 3e-6, (T, N, K)


@each_isa
def test_each_output_is_near_not_only_their_norm(isa):
    # bf16 rows, one rounding at the end: no output is off by more than that and fp32 sums.
    packed, q = drawn(40, 256, GRIDS[0])
    for T in (1, 4, 33):
        x = rows(T, 256)
        exact = x.double() @ q.dequantize().double().t()
        size = x.double().abs() @ q.dequantize().double().abs().t()
        with native.forced(isa):
            off = (wq_linear(x, packed).double() - exact).abs()
        assert bool((off <= exact.abs() * 2**-8 + size * 1e-6).all())


@each_isa
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[1], GRIDS[4], GRIDS[6]], ids=lambda g: g.kind)
def test_rows_whose_inputs_differ_in_size(isa, grid):
    # What is rounded of an input (csrc/wq/whole.h) is under 2^-22 of the largest in its piece.
    K, draw = 1088, torch.Generator().manual_seed(0)
    packed, q = drawn(24, K, grid)
    w = q.dequantize().double()
    for T in (1, 2, 3, 4, 5):
        power = 12 * torch.rand(T, K, generator=draw) - 8
        x = (
            rows(T, K).float() * 10**power * 10.0 ** (-30 * (torch.arange(T) % 2))[:, None]
        ).bfloat16()
        x[:, 256:768] = 0
        exact, size = x.double() @ w.t(), x.double().abs() @ w.abs().t()
        largest = x.double().abs().amax(1, keepdim=True) * w.abs().sum(1)
        with native.forced(isa):
            off = (wq_linear(x, packed).double() - exact).abs()
            assert bool(wq_linear(torch.zeros_like(x), packed).eq(0).all())
        assert bool((off <= exact.abs() * 2**-8 + size * 1e-6 + largest * 2**-22).all()), T


@each_isa
def test_what_is_not_finite_stays_in_its_row(isa):
    packed, _ = drawn(40, 256, GRIDS[0])
    for T in (2, 4, 20):
        x = rows(T, 256)
        x[0, 5], x[1, 200] = torch.inf, torch.nan
        with native.forced(isa):
            found, plain = wq_linear(x, packed), wq_linear(rows(T, 256), packed)
        assert not bool(found[:2].isfinite().any()) and torch.equal(found[2:], plain[2:])


@each_isa
@pytest.mark.parametrize("T", [1, 3, 40], ids=str)
def test_the_same_bits_for_any_number_of_threads(isa, T):
    packed, _ = drawn(300, 128, GRIDS[1])
    x = rows(T, 128)
    with native.forced(isa):
        same_bits(lambda: [wq_linear(x, packed)])


def experts(E: int, N: int, K: int, grid: Grid) -> PackedWeight:
    return stack([drawn(N, K, grid, seed=e)[0] for e in range(E)])


def _spread_over(weight: PackedWeight, E: int) -> dict[str, Tensor | None]:
    """Of one expert, for E that differ in their scales."""
    size = torch.linspace(0.5, 2, E).view(E, 1, 1, 1)
    scale = (weight.scale.float() * size).to(weight.scale.dtype)
    zero = None if weight.zero is None else weight.zero.repeat(E, 1, 1, 1)
    return {"codes": weight.codes.repeat(E, 1, 1), "scale": scale, "zero": zero}


def routed(T: int, A: int, E: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.rand(T, E, generator=draw).argsort(dim=1)[:, :A].contiguous()
    return ids, torch.rand(T, A, generator=draw)


@each_isa
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("grid", [GRIDS[1], GRIDS[4], GRIDS[5]], ids=lambda g: str(g.kind))
def test_experts_over_routed_rows(isa, grid, dtype):
    E, D, inner = 4, 40, 56
    w1, w2 = experts(E, 2 * inner, D, grid), experts(E, D, inner, grid)
    cases = [(*routed(T, 2, E), T) for T in (0, 1, 2, 70)]
    one = torch.full((6, 1), 2), torch.ones(6, 1)  # all to one, the others idle
    for ids, weights, T in [*cases, (*one, 6)]:
        x = rows(T, D, dtype=dtype)
        expected = wq_moe_reference(x, ids, weights, w1, w2)
        with native.forced(isa), poisoned():
            found = wq_moe(x, ids, weights, w1, w2)
        assert found.dtype is dtype and error(found, expected) <= 2 * BOUND[dtype], T


@each_isa
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[3], GRIDS[5]], ids=lambda g: str(g.kind))
def test_a_few_rows_of_many_experts(isa, grid):
    E, D, inner = 40, 1088, 32
    one = [experts(1, 2 * inner, D, grid), experts(1, D, inner, grid)]
    w1, w2 = (dataclasses.replace(w, **_spread_over(w, E)) for w in one)
    ids = torch.tensor([[39, 0], [33, 39], [39, 32], [31, 39], [2, 39]])  # five rows of the last
    weights, x = torch.rand(5, 2, generator=torch.Generator().manual_seed(2)), rows(5, D)
    expected = wq_moe_reference(x, ids, weights, w1, w2)
    with native.forced(isa), poisoned():
        found = wq_moe(x, ids, weights, w1, w2)
    assert error(found, expected) <= 2 * BOUND[x.dtype]


def test_experts_with_groups_of_their_own_are_one_product():
    """As bits=auto leaves them: scales are repeated, so the numbers are the same."""
    grids = [Grid(GridKind.int4, group) for group in (0, 128, 32, 64)]
    w1, w2 = (
        [drawn(*shape, grid, seed=e)[0] for e, grid in enumerate(grids)]
        for shape in ((2 * 64, 1088), (1088, 64))
    )
    for weight in (*w1, *w2):
        finer = regrouped(weight, 32)
        assert finer.group == 32 and finer.scale.shape[-2] == weight.num_inputs // 32
        assert torch.equal(unpack(finer), unpack(weight))
    made = QuantExperts(w1, w2)
    assert made.stacked is not None and [w.group for w in made.stacked] == [32, 32]
    for e in range(4):
        for found, weight in zip(made.of(e), (w1[e], w2[e])):
            assert torch.equal(unpack(found), unpack(weight))
    uneven = [*w1[:3], drawn(2 * 64, 1088, Grid(GridKind.int8, 32))[0]]
    assert QuantExperts(uneven, w2).stacked is None


@each_isa
def test_experts_give_the_same_bits_for_any_number_of_threads(isa):
    w1, w2 = experts(3, 160, 64, GRIDS[0]), experts(3, 64, 80, GRIDS[0])
    ids, weights = routed(21, 2, 3)
    x = rows(21, 64)
    with native.forced(isa):
        same_bits(lambda: [wq_moe(x, ids, weights, w1, w2)])


def test_without_a_library_torch_serves():
    packed, _ = drawn(24, 64, GRIDS[5])
    x = rows(2, 3, 64)
    with native.forced(None):
        assert torch.equal(wq_linear(x, packed), wq_linear_reference(x, packed))


@needs_library
def test_the_ops_keep_torchs_rules():
    packed, _ = drawn(24, 64, GRIDS[1])
    x = rows(3, 64)
    words = (packed.codes, packed.scale, packed.zero, packed.values, 4, 32, 24)
    torch.library.opcheck(torch.ops.ptm.wq_linear.default, (x, *words))
    whole = torch.compile(lambda x: wq_linear(x, packed), fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(x), wq_linear(x, packed))
    w1, w2 = experts(2, 64, 32, GRIDS[0]), experts(2, 32, 32, GRIDS[0])
    ids, weights = routed(5, 1, 2)
    args = (rows(5, 32), ids, weights, w1.codes, w1.scale, None, w1.group, w2.codes, w2.scale,
            None, w2.values, w2.group, 4, 32)  # fmt: skip
    torch.library.opcheck(torch.ops.ptm.wq_moe.default, args)
