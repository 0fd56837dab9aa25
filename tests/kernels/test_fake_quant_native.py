"""The compiled grid against its definition, bit for bit, on every instruction set here."""

import itertools

import pytest
import torch

from ptm.kernels import native
from ptm.quant.fake_quant import fake_quant, on_grid
from ptm.quant.grid import Grid, GridKind
from tests.support.native import each_isa, needs_library, poisoned, same_bits

SIZES = (1.0, 1e-3, 1e-6, 3e-8, 1e-9, 500.0)  # of weights: scales that underflow are among them
GRIDS = [Grid(kind, group) for kind in GridKind for group in (0, 32, 128)]
GRIDS += [Grid(kind, group, False) for kind in (GridKind.int4, GridKind.int8) for group in (0, 32)]


def weights(*shape, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(dtype)


def bits(t):
    return t.detach().float().view(torch.int32)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_bits_are_the_references(isa, dtype, grid):
    for K, size in itertools.product((1, 7, 96, 256, 300), SIZES):
        w = (weights(9, K) * size).to(dtype)
        w[2], w[3, : K // 2] = 0, 0
        w[4, :3] = torch.tensor([1.0, -1.0, 0.5])[:K] * size  # ends of the grid, and a tie
        w[5], w[6] = w[5].abs(), -w[6].abs()
        expected = on_grid(w, grid).dequantize().view(w.shape).to(dtype)
        with native.forced(isa), poisoned():
            found = fake_quant(w, grid)
        assert found.dtype is dtype and torch.equal(bits(found), bits(expected)), (K, size)


@each_isa
@pytest.mark.parametrize("kind", list(GridKind))
def test_ties_and_values_of_the_grid(isa, kind):
    """Values of the grid stay; what lies half-way between two goes to the even code."""
    grid = Grid(kind, 0)
    values = grid.values() if not grid.is_int else grid.values() - grid.middle
    values = values.sort().values
    middles = (values[1:] + values[:-1]) / 2
    for row in (values, middles, middles.nextafter(values[1:]), middles.nextafter(values[:-1])):
        w = torch.cat([row, torch.tensor([grid.largest, -grid.largest])])[None]  # scale 1
        with native.forced(isa):
            found = fake_quant(w, grid)
        assert torch.equal(bits(found), bits(on_grid(w, grid).dequantize()))
    assert torch.equal(bits(found)[0, :-2] & 0x7FFFFFFF, bits(values[:-1]) & 0x7FFFFFFF)


@each_isa
@pytest.mark.parametrize("kind", list(GridKind))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e7, -1e7])
def test_what_has_no_scale_is_refused(isa, kind, bad):
    w = weights(5, 64)
    w[3, 40] = bad * (1 if kind is GridKind.int4 else 100)
    for backend in (isa, None):
        with native.forced(backend), pytest.raises(ValueError, match="not finite, or too large"):
            fake_quant(w, Grid(kind, 32))


@each_isa
def test_stacks_gaps_and_nothing(isa):
    grid = Grid(GridKind.int4, 32)
    w = weights(3, 10, 64, seed=1)
    with native.forced(isa):
        for view in (w, w[:, ::2], w.transpose(0, 1), w[..., :32], w[:0], w[:, :0]):
            expected = on_grid(view, grid).dequantize().view(view.shape) if view.numel() else view
            assert torch.equal(bits(fake_quant(view, grid)), bits(expected))


@each_isa
def test_the_gradient_goes_straight_through_and_bits_do_not_depend_on_threads(isa):
    w, grad = weights(300, 512).requires_grad_(), weights(300, 512, seed=2)
    with native.forced(isa):
        out = fake_quant(w, Grid(GridKind.int4))
        assert torch.equal(torch.autograd.grad(out, w, grad)[0], grad)
        same_bits(lambda: [fake_quant(w, Grid(GridKind.fp6_e2m3))])


@needs_library
def test_torch_knows_the_op():
    w = weights(4, 64).requires_grad_()
    torch.library.opcheck(torch.ops.ptm.fake_quant.default, (w, 4, 0, 32, True))
    whole = torch.compile(
        lambda w: fake_quant(w, Grid(GridKind.int4, 32)) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(whole(w), fake_quant(w, Grid(GridKind.int4, 32)) * 2)


@needs_library
def test_as_torchs_own_rounding():
    """torch.fake_quantize multiplies with the inverse, and agrees but where that rounds apart."""
    w, size = weights(64, 256), 64
    grid = Grid(GridKind.int8, size)
    scale, _ = grid.scales(w)
    groups = w.view(-1, size)
    theirs = torch.fake_quantize_per_channel_affine(
        groups, scale.float().flatten(), torch.zeros(len(groups), dtype=torch.int32), 0, -128, 127
    )
    ours = fake_quant(w, grid).view(-1, size)
    off = (ours - theirs).abs() / scale.float().view(-1, 1)
    assert (off > 0.5).float().mean() < 1e-3 and off.max() < 1.5
