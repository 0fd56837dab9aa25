"""Layouts of files: exact inverses, and words written down by hand from the formats' own rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.quant.grid import Grid, GridKind, Quantized, round_to_nearest
from ptm.quant.pack import MARKS, Format, from_tensors, pack_words, to_tensors, unpack_words

INTS = [GridKind.int4, GridKind.int8]
FP6 = [GridKind.fp6_e3m2, GridKind.fp6_e2m3]


def quantized(grid: Grid, n: int, k: int, seed: int = 0) -> Quantized:
    g = torch.Generator().manual_seed(seed)
    return round_to_nearest(torch.randn(n, k, generator=g), grid)


def same(a: Quantized, b: Quantized) -> bool:
    zeros = a.zero_NG is b.zero_NG is None or torch.equal(a.zero_NG, b.zero_NG)  # type: ignore
    return torch.equal(a.codes_NK, b.codes_NK) and torch.equal(a.scale_NG, b.scale_NG) and zeros


def test_first_code_has_the_lowest_bits() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.uint8)
    assert pack_words(codes, 4, 1).tolist() == [[0xF7654321 - 2**32]]
    assert pack_words(codes.t(), 4, 0).tolist() == [[0xF7654321 - 2**32]]
    assert pack_words(codes[:, 4:], 8, 1).tolist() == [[0x0F070605]]


def test_gptq_stores_zero_less_one_and_v2_stores_zero() -> None:
    q = quantized(Grid(GridKind.int4, 32), 16, 64)
    for format, word in ((Format.gptq, 0x77777777), (Format.gptq_v2, 0x88888888 - 2**32)):
        tensors = to_tensors(q, format)
        assert tensors["qzeros"].unique().tolist() == [word]
        assert tensors["qweight"].shape == (8, 16) and tensors["scales"].shape == (2, 16)
        assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32


@pytest.mark.parametrize("kind", INTS)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 9),
    group=st.sampled_from([0, 8, 16, 32]),
    is_symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_integers_come_back(kind: GridKind, n, k, group, is_symmetric, seed) -> None:
    q = quantized(Grid(kind, group, is_symmetric), 8 * n, 8 * k, seed)
    for format in (Format.gptq, Format.gptq_v2, Format.compressed_tensors):
        tensors = to_tensors(q, format)
        assert MARKS[format] in tensors
        found, order = from_tensors(tensors, q.grid, format)
        assert order is None and same(found, q)
        assert torch.equal(found.dequantize(), q.dequantize())


@given(n=st.integers(1, 70), k=st.integers(1, 40), group=st.sampled_from([0, 5, 16]))
@settings(max_examples=30, deadline=None)
def test_formats_with_a_shape_hold_any_size(n: int, k: int, group: int) -> None:
    for kind, format in [(k, Format.compressed_tensors) for k in INTS] + [
        (k, Format.fp6) for k in FP6
    ]:
        q = quantized(Grid(kind, group), n, k)
        found, _ = from_tensors(to_tensors(q, format), q.grid, format)
        assert same(found, q)


@pytest.mark.parametrize("kind", FP6)
def test_fp6_words_are_where_a_lane_of_the_mma_wants_them(kind: GridKind) -> None:
    q = quantized(Grid(kind, 0), 128, 32)
    tensors = to_tensors(q, Format.fp6)
    low, high = (tensors[f"weight_{part}"].long() & 0xFFFFFFFF for part in ("low", "high"))
    for slab_row, slab_column, lane, tile in ((0, 0, 0, 0), (1, 1, 31, 3), (0, 1, 6, 2)):
        g, t = lane >> 2, lane & 3
        for j, (row, column) in enumerate(
            [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1),
             (g, 2 * t + 8), (g, 2 * t + 9), (g + 8, 2 * t + 8), (g + 8, 2 * t + 9)]
        ):  # fmt: skip
            code = int(q.codes_NK[64 * slab_row + 16 * tile + row, 16 * slab_column + column])
            at = slab_row, slab_column, lane
            assert int(low[at][tile]) >> 4 * j & 15 == code & 15
            assert int(high[at][tile // 2]) >> (16 * (tile % 2) + 2 * j) & 3 == code >> 4


@pytest.mark.parametrize("format", [Format.gptq, Format.compressed_tensors])
def test_scattered_groups_of_activation_order_come_back_sorted(format: Format) -> None:
    q = quantized(Grid(GridKind.int4, 16), 16, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    tensors = to_tensors(q, format)
    inverse = torch.argsort(order)
    scattered = Quantized(q.grid, q.codes_NK[:, inverse].contiguous(), q.scale_NG)
    tensors |= {k: v for k, v in to_tensors(scattered, format).items() if k == MARKS[format]}
    groups = (torch.arange(64) // 16)[inverse].to(torch.int32)
    tensors["g_idx" if format is Format.gptq else "weight_g_idx"] = groups
    found, sorted_by = from_tensors(tensors, q.grid, format)
    assert sorted_by is not None
    near = torch.empty(16, 64)
    near[:, sorted_by] = found.dequantize()
    assert torch.equal(near, q.dequantize()[:, inverse])


def test_what_does_not_belong_together_is_refused() -> None:
    q = quantized(Grid(GridKind.int4, 16), 16, 64)
    good = to_tensors(q, Format.gptq)
    for changes, what in (
        ({"scales": good["scales"][:2]}, "scales has shape"),
        ({"qzeros": good["qzeros"][:, :1]}, "qzeros has shape"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx does not put 16"),
        ({"qzeros": good["qzeros"] + 1}, "not those of a symmetric grid"),
        ({"scales": good["scales"] * torch.nan}, "a scale is not finite"),
    ):
        with pytest.raises(ValueError, match=what):
            from_tensors(good | changes, q.grid, Format.gptq)
    with pytest.raises(ValueError, match="must divide by 8"):
        to_tensors(quantized(q.grid, 12, 64), Format.gptq)
    with pytest.raises(ValueError, match="does not hold"):
        to_tensors(q, Format.fp6)
    assert torch.equal(unpack_words(pack_words(q.codes_NK, 4, 1), 4, 1, 64), q.codes_NK)
