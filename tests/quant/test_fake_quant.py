"""Weights on a grid in the forward, gradients as if they were not, names as before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ptm.engine.split import join, split
from ptm.export.layer import working_weight
from ptm.model.config import ModelConfig
from ptm.model.experts import Experts
from ptm.quant.fake_quant import fake_quant, plain, quantize_experts, quantize_linear
from ptm.quant.grid import Grid, GridKind, round_to_nearest

GRIDS = [Grid(kind, 16) for kind in GridKind] + [Grid(GridKind.int4, 0, is_symmetric=False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.kind}-{g.is_symmetric}")
def test_forward_is_the_grid_and_backward_is_not(grid: Grid, dtype: torch.dtype) -> None:
    w = (torch.randn(2, 6, 32) * 0.1).to(dtype).requires_grad_()
    seen = fake_quant(w, grid)
    near = round_to_nearest(w.detach().view(12, 32).float(), grid).dequantize()
    assert torch.equal(seen.float().view(12, 32), near.to(dtype).float())
    wanted = torch.randn_like(seen)
    seen.backward(wanted)
    assert w.grad is not None and torch.equal(w.grad, wanted)


def test_turned_modules_keep_names_and_parameters() -> None:
    grid = Grid(GridKind.int4, 16)
    linear = nn.Linear(32, 8, bias=False)
    before, names = linear.weight, list(linear.state_dict())
    quantize_linear(linear, grid)
    x = torch.randn(5, 32)
    near = round_to_nearest(before.detach(), grid).dequantize()
    assert torch.equal(linear(x), x @ near.t())
    assert plain(linear, "weight") is before and dict(linear.named_parameters())["weight"] is before
    assert list(linear.state_dict()) == names and linear.state_dict()["weight"] is not None
    linear(x).sum().backward()
    assert before.grad is not None

    experts = Experts(ModelConfig(hidden_size=32, moe_intermediate_size=16, num_experts=4))
    nn.init.normal_(experts.w1, std=0.1)
    nn.init.normal_(experts.w2, std=0.1)
    w1 = experts.w1
    quantize_experts(experts, grid)
    assert plain(experts, "w1") is w1 and not torch.equal(experts.w1, w1)
    flat = round_to_nearest(w1.detach().view(-1, 32), grid).dequantize()
    assert torch.equal(experts.w1.detach(), flat.view_as(w1))


def test_working_weights_are_the_upper_half_of_the_masters() -> None:
    master = torch.randn(1000)
    master[:3] = torch.tensor([1.00390625, -1.00390625, 1.01171875])  # ties of bf16
    weight, rest = torch.empty(1000, dtype=torch.bfloat16), torch.empty(1000, dtype=torch.int16)
    split(master.clone(), weight, rest)
    assert torch.equal(working_weight(master), weight.float())
    assert torch.equal(join(weight, rest, torch.empty(1000)), master)
