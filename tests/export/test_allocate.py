"""Bits under a size: against brute force, and a model whose sensitivities are known."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.export.allocate import Cost, choose_bits, measure
from ptm.export.config import ExportFormat
from ptm.export.m32 import linears_of
from ptm.export.plot import bits_svg
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


def total(costs: dict[str, Cost], bits: dict[str, int]) -> tuple[float, int]:
    return (
        sum(costs[n].kl[b] for n, b in bits.items()),
        sum(costs[n].size[b] for n, b in bits.items()),
    )


@given(data=st.data(), count=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_choice_keeps_the_size_and_is_near_the_best(data, count: int) -> None:
    costs = {}
    for i in range(count):
        a, b = sorted(data.draw(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=2)))
        costs[str(i)] = Cost({4: b, 8: a, 16: 0.0}, {4: 50, 8: 100, 16: 200})
    budget = data.draw(st.integers(50 * count, 210 * count))
    bits = choose_bits(costs, budget)
    found, size = total(costs, bits)
    assert size <= budget
    every = (dict(zip(costs, c)) for c in itertools.product((4, 8, 16), repeat=count))
    best = min(total(costs, b)[0] for b in every if total(costs, b)[1] <= budget)
    worst_gain = max(c.kl[4] for c in costs.values())
    assert best - 1e-12 <= found <= best + worst_gain  # greedy is off by one step at most
    with pytest.raises(ValueError, match="are needed"):
        choose_bits(costs, 50 * count - 1)


def test_measured_costs_find_the_linear_that_matters_and_leave_the_model_alone() -> None:
    torch.manual_seed(0)
    model = Transformer(MODEL)
    model.init_weights(seed=1)
    linears = linears_of(MODEL, Layers.default)
    loud = "model.layers.1.self_attn.o_proj"
    parameter_of(model, loud).mul_(8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 128, (4, 32))
    grids = {4: Grid(GridKind.int4, 32), 8: Grid(GridKind.int8, 32)}
    seen: list[str] = []
    costs = measure(
        model, linears, grids, ExportFormat.gptq, ids, torch.zeros_like(ids), seen.append
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert set(costs) == set(linears) and len(seen) == 2 * 6 * 2
    assert all(c.kl[8] <= c.kl[4] and c.kl[16] == 0 for c in costs.values() if c.kl[4] > 1e-7)
    shared = [n for n in costs if "layers.1.self_attn" in n]
    assert max(shared, key=lambda n: costs[n].kl[4]) == loud
    outputs, inputs = linears[loud]
    written = {
        bits: to_tensors(round_to_nearest(torch.zeros(outputs, inputs), grid), Format.gptq)
        for bits, grid in grids.items()
    }
    sizes = {bits: sum(t.nbytes for t in tensors.values()) for bits, tensors in written.items()}
    assert costs[loud].size == {**sizes, 16: 2 * outputs * inputs}
    least = sum(c.size[4] for c in costs.values())
    gains = {n: (c.kl[4] - c.kl[8]) / (c.size[8] - c.size[4]) for n, c in costs.items()}
    best = max(gains, key=lambda n: gains[n])
    bits = choose_bits(costs, least + costs[best].size[8] - costs[best].size[4])
    assert bits[best] == 8 and list(bits.values()).count(8) == 1


def test_drawing_has_a_cell_for_every_linear() -> None:
    bits = {f"model.layers.{i}.mlp.experts.{e}.w1": 4 * 2**e for i in range(2) for e in range(3)}
    drawn = ElementTree.fromstring(bits_svg(bits))
    titles = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == [f"{name}: {count}" for name, count in bits.items()]
