"""Cuts and pages: every element once, whole rows, little waste, on any number of ranks."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.engine.layout import ALIGN, Format, Named, PageMap, make_layout
from ptm.engine.state import stored_shape
from ptm.model.config import ModelConfig
from ptm.model.transformer import Transformer
from ptm.parallel.apply import units_of

BF16 = Format(weight_bytes=2, is_split=True, is_int8=False)
FORMATS = {
    "bf16": BF16,
    "fp32": Format(weight_bytes=4, is_split=False, is_int8=False),
    "int8": Format(weight_bytes=2, is_split=True, is_int8=True),
}


def _named(model: ModelConfig) -> list[tuple[str, list[Named]]]:
    units = units_of(Transformer(model, device="meta"))
    return [(unit.name, list(unit.members)) for unit in units]


PUBLISHED = _named(ModelConfig())


def _cells(layout, whole: dict[str, int]) -> None:
    for group, slot in layout.slots():
        start, stop = group.owned(slot)
        rows = slot.row_numel
        assert (start - slot.start) % rows == 0 and (stop - slot.start) % rows == 0
        whole[slot.name] = whole.get(slot.name, 0) + stop - start


@pytest.mark.parametrize("ep", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
def test_every_element_of_m32_lies_on_one_rank_and_pages_waste_little(world, ep):
    if world % ep:
        return
    counted: dict[str, int] = {}
    sizes = []
    for rank in range(world):
        layout = make_layout(PUBLISHED, world=world, ep=ep, rank=rank)
        _cells(layout, counted)
        sizes.append(layout.numel)
        if rank in (0, world - 1):
            for fmt in FORMATS.values():
                pages = PageMap(layout.numel, 4 * 2**20, fmt)
                assert pages.waste <= 0.012, (world, ep, rank, pages.waste)
    for _, members in PUBLISHED:
        for member in members:
            # Dense parameters once over all ranks, experts once over the ranks of all ep shares.
            assert counted[member.name] == math.prod(member.shape), member.name
    assert max(sizes) / min(sizes) < 1.02


@pytest.mark.parametrize("ep", [1, 8, 32])
@pytest.mark.parametrize("world", [256, 512])
def test_pages_waste_little_on_many_ranks(world, ep):
    for rank in (0, world // 2 + 1, world - 1):
        layout = make_layout(PUBLISHED, world=world, ep=ep, rank=rank)
        for fmt in FORMATS.values():
            # Half of what one rank of 512 holds of int8 moments is a handful of pages.
            most = 0.012 if world == 256 or not fmt.is_int8 else 0.02
            assert PageMap(layout.numel, 4 * 2**20, fmt).waste <= most


SHAPES = st.lists(
    st.sampled_from([(7,), (3, 5), (8, 4, 6), (8, 2, 3), (1, 9), (5, 3, 2, 1)]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (4, 4), (8, 8)]))
def test_cuts_cover_any_group_once_in_whole_rows(shapes, grid):
    world, ep = grid
    members = [Named(f"p{i}", s, len(s) == 3) for i, s in enumerate(shapes)]
    counted: dict[str, int] = {}
    rows: dict[str, list[tuple[int, int]]] = {}
    for rank in range(world):
        layout = make_layout([("unit", members)], world=world, ep=ep, rank=rank)
        _cells(layout, counted)
        for group, slot in layout.slots():
            assert group.base % ALIGN == 0
            start, stop = group.owned(slot)
            if stop > start:
                first = slot.first_row + (start - slot.start) // slot.row_numel
                rows.setdefault(slot.name, []).append(
                    (first, first + (stop - start) // slot.row_numel)
                )
    for member in members:
        assert counted[member.name] == math.prod(member.shape)
        spans = sorted(rows[member.name])
        assert spans[0][0] == 0 and spans[-1][1] == stored_shape(member.shape)[0]
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_pieces_walk_a_range_page_by_page(fmt):
    pages = PageMap(100_000, 64 * 1024, fmt)
    for kind in (pages.weights, pages.states, pages.grads):
        pieces = list(pages.pieces(kind, 1_000, 99_000))
        assert pieces[0].start == 1_000 and pieces[-1].stop == 99_000
        assert all(a.stop == b.start for a, b in zip(pieces, pieces[1:]))
        for piece in pieces:
            assert piece.offset == piece.start % kind.per_page
            assert piece.offset + piece.stop - piece.start <= kind.per_page
        assert list(kind.pages(1_000, 99_000)) == [piece.page for piece in pieces]
    seen = [pages.describe(page).split()[0] for page in range(pages.num_pages)]
    assert [seen.count(name) for name in ("weights", "states", "grads")] == [
        pages.weights.num_pages, pages.states.num_pages, pages.grads.num_pages
    ]  # fmt: skip
    assert seen == sorted(seen, key=("weights", "states", "grads").index)
