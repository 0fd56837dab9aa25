"""Rows of codes as bytes: the weights are those of the codes, bit for bit, for any run of rows."""

import itertools

import pytest
import torch

from ptm.quant.grid import Grid, GridKind, Quantized, round_to_nearest
from ptm.quant.rows import RowFormat


@pytest.mark.parametrize("kind", list(GridKind))
@pytest.mark.parametrize("num_inputs, group", [(32, 32), (64, 0), (96, 32), (384, 128), (512, 256)])
def test_any_rows_are_the_weights_of_their_codes(
    kind: GridKind, num_inputs: int, group: int
) -> None:
    generator = torch.Generator().manual_seed(num_inputs)
    w_NK = torch.randn(13, num_inputs, generator=generator)
    w_NK[5] = 0.0
    grid = Grid(kind, group)
    scale, zero = grid.scales(w_NK, num_candidates=8)  # int4 has negative ones among them
    q = Quantized(grid, grid.encode(w_NK, scale, zero), scale, zero)
    for element_bytes, (first, last) in itertools.product((2, 4), ((0, 13), (4, 5), (7, 13))):
        held = RowFormat(kind, element_bytes)
        rows = held.encode(q)
        assert rows.shape == (13, held.row_numel(num_inputs) * element_bytes)
        near = held.decode(rows[first:last], num_inputs)
        assert torch.equal(near.view(torch.int32), q.dequantize()[first:last].view(torch.int32))


@pytest.mark.parametrize("kind", list(GridKind))
def test_a_row_takes_the_bits_of_its_codes_and_a_scale_a_group(kind: GridKind) -> None:
    bits = Grid(kind).bits
    assert RowFormat(kind, 2).row_bytes(2048) == 2048 * bits // 8 + 16 * 2


@pytest.mark.parametrize(
    "kind, grid, num_inputs, told",
    [
        (GridKind.int8, Grid(GridKind.int4), 128, "is of int4"),
        (GridKind.int4, Grid(GridKind.int4, is_symmetric=False), 128, "has zero points"),
        (GridKind.int4, Grid(GridKind.int4, 32), 128, "groups of 32 of 128 inputs"),
        (GridKind.int4, Grid(GridKind.int4, 8), 8, "groups of 8 of 8"),
        (GridKind.int4, Grid(GridKind.int4, scale_dtype=torch.bfloat16), 128, "scales in bfloat16"),
    ],
)
def test_what_cannot_be_held_is_refused(
    kind: GridKind, grid: Grid, num_inputs: int, told: str
) -> None:
    q = round_to_nearest(torch.randn(4, num_inputs), grid)
    with pytest.raises(ValueError, match=told):
        RowFormat(kind, 2).encode(q)
