"""Frozen experts as codes in pages: the same bits as frozen weights, in a fraction of the bytes."""

import pytest
import torch
from torch import Tensor

from ptm.engine.layout import ALIGN, Format, Named, PageMap, make_layout
from ptm.model.init import new_weight
from ptm.model.lora_config import AdapterConfig, AdapterKind, Base
from ptm.quant.grid import Grid, GridKind, Quantized, round_to_nearest
from ptm.quant.rows import RowFormat
from tests.support.mesh import mesh_of_test
from tests.support.paged import MODEL, batch, make_engine
from tests.support.ranks import run_ranks

STEPS = 3


def quantized(name: str, shape: torch.Size, kind: GridKind) -> Quantized | None:
    """Of the frozen experts, as one matrix."""
    if not name.endswith(("experts.w1", "experts.w2")):
        return None
    whole = new_weight(MODEL, name, shape, seed=1)
    return round_to_nearest(whole.view(-1, shape[-1]), Grid(kind, 32))


@pytest.mark.parametrize("targets", [("q", "v"), ("o", "experts")])
@pytest.mark.parametrize(
    "world, ep, dtype, kind",
    [
        (1, 1, torch.float32, GridKind.int4),
        (1, 1, torch.bfloat16, GridKind.fp6_e2m3),
        (3, 1, torch.bfloat16, GridKind.int4),
        (2, 2, torch.float32, GridKind.int8),
        (4, 2, torch.bfloat16, GridKind.fp6_e3m2),
    ],
)
def test_codes_train_as_their_weights_do(
    world: int, ep: int, dtype: torch.dtype, kind: GridKind, targets: tuple[str, ...]
) -> None:
    for as_codes, as_weights, num_pages in run_ranks(world, learn, ep, dtype, kind, targets):
        assert as_codes == as_weights
        assert num_pages[0] <= num_pages[1]


def learn(
    rank: int, world: int, ep: int, dtype: torch.dtype, kind: GridKind, targets: tuple[str, ...]
) -> tuple[list[bytes], list[bytes], list[int]]:
    found, num_pages = [], []
    for base in (Base(kind), Base.plain):
        held = RowFormat(kind, dtype.itemsize) if base is not Base.plain else None

        def initial(name: str, shape: torch.Size, held: RowFormat | None = held) -> Tensor | None:
            q = quantized(name, shape, kind)
            return q and (held.encode(q) if held else q.dequantize().view(shape))

        engine = make_engine(
            mesh_of_test(rank, world, ep),
            zero=3,
            dtype=dtype,
            adapter=AdapterConfig(kind=AdapterKind.lora, targets=targets, rank=2, base=base),
            held=held,
            initial=initial,
        )
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        bits = []
        for step in range(STEPS):
            loss = engine.model.loss(batch(step, mine))
            bits.append(loss.nll_sum.detach().numpy().tobytes())
            engine.backward(loss.total, is_last=True, tokens=loss.tokens, lr=1e-2)
            engine.step(nll_sum=loss.nll_sum.detach(), tokens=loss.tokens, lr=1e-2, flags=[])
        engine.drain()
        bits += [rows.read().numpy().tobytes() for rows in engine.state().values()]
        assert len(set(bits)) > STEPS
        num_pages.append(engine.pages.num_pages)
        engine.close()
        found.append(bits)
    return found[0], found[1], num_pages


@pytest.mark.parametrize("ranks, ep", [(1, 1), (3, 1), (4, 2), (7, 1)])
def test_codes_take_their_bytes_and_shards_are_whole_rows(ranks: int, ep: int) -> None:
    held = RowFormat(GridKind.int4, 2)
    shapes = {"w1": (8, 192, 128), "w2": (8, 128, 96)}  # experts, rows, columns
    members = [Named(f"x.experts.{n}", s, True, True, held) for n, s in shapes.items()]
    members += [Named("a.weight", (50, 64), False, True), Named("a.lora_q_A", (4, 64), False)]
    total = 0
    for rank in range(ranks):
        layout = make_layout([("root", []), ("a", members)], world=ranks, ep=ep, rank=rank)
        *_, group = layout.units[1].groups
        assert group.held == held and group.is_frozen and layout.trained <= group.base
        assert layout.numel == -(-group.flat_stop // ALIGN) * ALIGN
        for slot in group.slots:
            start, stop = group.owned(slot)
            assert (start - slot.start) % slot.row_numel == 0 == (stop - start) % slot.row_numel
            rows = (stop - start) // slot.row_numel
            taken = group.flat(stop) - group.flat(start)
            assert taken == rows * held.row_numel(slot.row_numel)
            total += taken * 2
    assert total == sum(E * R * held.row_bytes(C) for E, R, C in shapes.values())
    pages = PageMap(
        layout.numel,
        2**20,
        Format(weight_bytes=2, is_split=True, is_int8=False),
        trained=layout.trained,
    )
    assert pages.weights.num_pages == -(-layout.numel * 2 // 2**20)
