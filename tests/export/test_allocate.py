"""Bits under a size: against brute force, and a model whose sensitivities are known."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.export.allocate import Cost, choose, measure
from ptm.export.config import AS_IS, ExportConfig, ExportFormat, Width
from ptm.export.m32 import linears_of
from ptm.export.plot import bits_svg
from ptm.export.quantize import grid_of
from ptm.export.verify import parameter_of
from ptm.model.config import ModelConfig
from ptm.model.transformer import Transformer
from ptm.quant.config import Layers
from ptm.quant.grid import Grid, GridKind, round_to_nearest
from ptm.quant.pack import Format, to_tensors

MODEL = ModelConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, attention_projection_size=128,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, vocab_size=128,
    max_position_embeddings=64, initializer_range=0.113,
)  # fmt: skip


ROW, PLAIN, FINE, EIGHT = Width(4, 0), Width(4, 128), Width(4, 32), Width(8, 128)


def total(costs: dict[str, Cost], chosen: dict[str, Width]) -> tuple[float, int]:
    return (
        sum(costs[n].kl[w] for n, w in chosen.items()),
        sum(costs[n].size[w] for n, w in chosen.items()),
    )


@given(data=st.data(), count=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_choice_keeps_the_size_and_is_near_the_best(data, count: int) -> None:
    widths, costs = (ROW, PLAIN, FINE, EIGHT, AS_IS), {}
    for i in range(count):
        drawn = data.draw(st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=4))
        kl = dict(zip(widths, [*sorted(drawn, reverse=True), 0.0]))
        costs[str(i)] = Cost(kl, dict(zip(widths, (50, 52, 56, 100, 200))))
    budget = data.draw(st.integers(50 * count, 210 * count))
    chosen = choose(costs, budget)
    found, size = total(costs, chosen)
    assert size <= budget
    every = (dict(zip(costs, c)) for c in itertools.product(widths, repeat=count))
    best = min(total(costs, c)[0] for c in every if total(costs, c)[1] <= budget)
    worst_gain = max(c.kl[ROW] for c in costs.values())
    assert best - 1e-12 <= found <= best + worst_gain  # greedy is off by one step at most
    with pytest.raises(ValueError, match="are needed"):
        choose(costs, 50 * count - 1)


def test_a_row_of_few_inputs_gives_its_scales_to_one_that_matters() -> None:
    """At the size of all at 4 bits in groups of 128."""
    size = {ROW: 500, PLAIN: 520, EIGHT: 1000, AS_IS: 2000}
    quiet = Cost({ROW: 1.2e-5, PLAIN: 1e-5, EIGHT: 1e-6, AS_IS: 0.0}, size)
    loud = Cost({ROW: 1.3e-2, PLAIN: 1e-2, EIGHT: 1e-3, AS_IS: 0.0}, size)
    costs = {f"quiet {i}": quiet for i in range(24)} | {"loud": loud}
    chosen = choose(costs, 25 * 520)
    assert chosen["loud"] == EIGHT and set(chosen.values()) == {ROW, EIGHT}
    assert total(costs, chosen)[0] < 0.2 * total(costs, dict.fromkeys(costs, PLAIN))[0]


def test_what_is_chosen_among_goes_by_the_group() -> None:
    found = {g: ExportConfig(run="", group=g).widths for g in (128, 48, 32, 0)}
    assert found[128] == (PLAIN, FINE, ROW, EIGHT)
    assert found[48] == (Width(4, 48), ROW, Width(8, 48))
    assert found[32] == (FINE, ROW, Width(8, 32)) and found[0] == (ROW, Width(8, 0))
    assert [str(w) for w in (PLAIN, ROW, AS_IS)] == ["4/128", "4/row", "16"]


def test_measured_costs_find_the_linear_that_matters_and_leave_the_model_alone() -> None:
    torch.manual_seed(0)
    model = Transformer(MODEL)
    model.init_weights(seed=1)
    linears = linears_of(MODEL, Layers.default)
    loud = "model.layers.1.self_attn.o_proj"
    parameter_of(model, loud).mul_(8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 128, (4, 32))
    config = ExportConfig(run="", group=32)
    plain, row, eight = config.widths
    grids = {width: grid_of(config, width=width) for width in (plain, row, eight)}
    assert grids[row] == Grid(GridKind.int4, 0)
    seen: list[str] = []
    costs = measure(
        model, linears, grids, ExportFormat.gptq, ids, torch.zeros_like(ids), seen.append
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert set(costs) == set(linears) and len(seen) == 2 * 6 * 2
    for cost in costs.values():
        assert cost.kl[AS_IS] == 0
        if cost.kl[plain] > 1e-7:
            assert cost.kl[eight] <= cost.kl[plain] < cost.kl[row] < 2 * cost.kl[plain]
    shared = [n for n in costs if "layers.1.self_attn" in n]
    assert max(shared, key=lambda n: costs[n].kl[plain]) == loud
    outputs, inputs = linears[loud]
    written = {
        width: to_tensors(round_to_nearest(torch.zeros(outputs, inputs), grid), Format.gptq)
        for width, grid in grids.items()
    }
    sizes = {w: sum(t.nbytes for t in tensors.values()) for w, tensors in written.items()}
    assert costs[loud].size == {**sizes, AS_IS: 2 * outputs * inputs}
    costs = {n: Cost(c.kl, {w: c.size[w] for w in (plain, eight)}) for n, c in costs.items()}
    least = sum(c.size[plain] for c in costs.values())
    steps = {n: c.size[eight] - c.size[plain] for n, c in costs.items()}
    best = max(costs, key=lambda n: (costs[n].kl[plain] - costs[n].kl[eight]) / steps[n])
    chosen = choose(costs, least + steps[best])
    assert chosen[best] == eight and list(chosen.values()).count(eight) == 1


def test_drawing_has_a_cell_for_every_linear() -> None:
    widths = {
        f"model.layers.{i}.mlp.experts.{e}.w1": width
        for i in range(2)
        for e, width in enumerate((ROW, FINE, EIGHT, AS_IS))
    }
    drawn = ElementTree.fromstring(bits_svg(widths))
    titles = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == [f"{name}: {width}" for name, width in widths.items()]
    assert titles[0].endswith("w1: 4/row")
