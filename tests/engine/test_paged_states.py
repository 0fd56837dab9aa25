"""Numbers in pages: what is written is read, in every format, at any row; nothing else moves."""

import pytest
import torch

from ptm.engine.config import EngineConfig, MomentsKind
from ptm.engine.layout import Format, Named, PageMap, make_layout
from ptm.engine.page_rows import PageRows
from ptm.engine.states import PagedStates
from tests.support.mesh import mesh_of_test
from tests.support.paged import PlainStore, make_engine, run_steps, whole_state
from tests.support.ranks import run_ranks

SHAPES = {"a": (37, 11), "e": (4, 5, 7), "n": (23,), "c": (6, 3, 2, 1)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = {"master": 0.0, "exp_avg": 0.02, "exp_avg_sq": 0.02}


def _states(dtype: torch.dtype, is_int8: bool):
    members = [Named(name, shape, False) for name, shape in SHAPES.items()]
    layout = make_layout([("unit", members)], world=1, ep=1, rank=0)
    is_split = dtype == torch.bfloat16
    fmt = Format(weight_bytes=2 if is_split else 4, is_split=is_split, is_int8=is_int8)
    pages = PageMap(layout.numel, 4096, fmt)  # small, so that tensors cross pages
    states = PagedStates(PlainStore(pages), pages, dtype)
    return {
        (slot.name, what): PageRows(states, group, slot, what)
        for group, slot in layout.slots()
        for what in KINDS
    }


def _values(rows: PageRows, what: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows.num_rows, *rows.shape[1:], generator=generator)
    return values.square() * 1e-4 if what == "exp_avg_sq" else values


def _close(found: torch.Tensor, wanted: torch.Tensor, what: str, is_int8: bool) -> bool:
    """Equal; of int8 moments within two steps of the largest value of any tensor (4 sigma), since
    tensors share blocks, and a block that holds two is coded twice."""
    if not is_int8 or what == "master":
        return torch.equal(found, wanted)
    if what == "exp_avg":
        return float((found - wanted).abs().max()) <= 2 * 4.0 / 127
    step = 4e-2 / 255  # linear in the root, rounded up
    error = found.sqrt() - wanted.sqrt()
    return float(error.max()) <= 2 * step and float(error.min()) >= -0.01 * step


@pytest.mark.parametrize("is_int8", [False, True], ids=["fp32 moments", "int8 moments"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_is_written_is_read_and_a_part_moves_nothing_else(dtype, is_int8):
    states = _states(dtype, is_int8)
    written = {}
    for i, ((name, what), rows) in enumerate(states.items()):
        written[name, what] = _values(rows, what, i)
        rows.write(written[name, what])
    for (name, what), rows in states.items():
        assert _close(rows.read(), written[name, what], what, is_int8), (name, what)

    again = {key: rows.read() for key, rows in states.items()}
    for key, rows in states.items():  # what was read once is kept to the bit
        rows.write(again[key])
    for key, rows in states.items():
        assert torch.equal(rows.read(), again[key]), key

    for (name, what), rows in states.items():
        middle = rows.within(2, 5)
        assert (middle.first_row, middle.num_rows) == (2, 3)
        middle.write(torch.zeros_like(middle.read()))
        found = rows.read()
        assert bool((found[2:5] == 0).all())
        for part in (slice(0, 2), slice(5, None)):
            if is_int8 and what != "master":
                assert _close(found[part], again[name, what][part], what, True)
            else:
                assert torch.equal(found[part], again[name, what][part])
        rows.write(again[name, what])


def test_zeros_of_int8_moments_stay_zeros():
    states = _states(torch.bfloat16, True)
    for rows in states.values():
        assert bool((rows.read() == 0).all())
        rows.write(torch.zeros(rows.num_rows, *rows.shape[1:]))
        assert bool((rows.read() == 0).all())


def _losses(rank, world, moments):
    mesh = mesh_of_test(rank, world)
    config = EngineConfig(page_mib=1, moments=moments)
    engine = make_engine(mesh, zero=2, dtype=torch.bfloat16, config=config)
    pages = engine.pages
    outcomes = run_steps(engine, mesh, [i % 4 for i in range(40)], lr=3e-3)
    state = whole_state(engine)
    engine.close()
    per_element = (pages.format.state_block_bytes / 128) + pages.format.weight_bytes
    return [o.loss for o in outcomes], per_element, state


def test_int8_moments_halve_the_states_and_train_as_well():
    (wide, wide_bytes, _), (narrow, narrow_bytes, state) = (
        run_ranks(1, _losses, moments)[0] for moments in MomentsKind
    )
    assert wide_bytes == 12 and narrow_bytes <= 6.1
    assert wide[-1] < wide[0] * 0.8, "nothing was learnt: not a test of moments"
    assert abs(sum(narrow[-4:]) - sum(wide[-4:])) / sum(wide[-4:]) < 0.05
    assert (state["optim.exp_avg.model.norm.weight"][1] != 0).any()
