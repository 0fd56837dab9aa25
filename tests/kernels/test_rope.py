"""Rotary embedding against its definition, complex numbers, and the published tables' quirks."""

import pytest
import torch

from ptm.kernels.rope import rope, rope_angles, rope_reference
from tests.support.compare import assert_same_maths, distance, random

MODES = ["fp32", "megatron", "hf_bf16"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotary_dim", [8, 16], ids=["half", "whole head"])
def test_agrees_with_the_definition(dtype, rotary_dim):
    x = random(2, 5, 3, 2, 16, dtype=dtype)
    positions = torch.arange(5).expand(2, 5) + torch.tensor([[0], [9]])
    angles = rope_angles(positions, rotary_dim=rotary_dim, base=1e4, mode="fp32")
    grad = random(2, 2, 3, 5, 16, dtype=dtype, seed=1, grad=False)
    assert_same_maths(
        lambda x: rope(x, *angles), lambda x: rope_reference(x, *angles), [x], grad=grad
    )


def test_is_a_rotation_of_complex_numbers():
    x = random(1, 7, 1, 1, 12, dtype=torch.float64, grad=False)
    cos, sin = rope_angles(torch.arange(7)[None], rotary_dim=8, base=100.0, mode="fp32")
    numbers = torch.complex(x[..., :4], x[..., 4:8])
    powers = torch.arange(7)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    turned = numbers[0, :, 0, 0] * torch.polar(torch.ones(7, 4).double(), powers.double())
    found = rope(x, cos, sin)[0, 0, 0]
    assert distance(found[:, :4], turned.real) < 1e-6
    assert distance(found[:, 4:8], turned.imag) < 1e-6
    assert torch.equal(found[:, 8:], x[0, :, 0, 0, 8:])


def test_hf_positions_collapse_as_published():
    positions = torch.arange(16_384)[None]
    cos, sin = rope_angles(positions, rotary_dim=128, base=40_890.0, mode="hf_bf16")
    assert torch.cat([cos, sin], dim=-1)[0].unique(dim=0).shape[0] <= 1025
    assert torch.equal(cos[0, 1001], cos[0, 1000])
    assert torch.equal(cos, rope_angles(positions, rotary_dim=128, base=1e4, mode="hf_bf16")[0])


def test_modes_drift_apart_by_radians():
    positions = torch.tensor([[0, 1000]])
    tables = {m: rope_angles(positions, rotary_dim=128, base=1e4, mode=m)[0] for m in MODES}
    for mode in ("megatron", "hf_bf16"):
        assert torch.equal(tables[mode][0, 0], tables["fp32"][0, 0])
        assert (tables[mode] - tables["fp32"])[0, 1].abs().max() > 0.5
