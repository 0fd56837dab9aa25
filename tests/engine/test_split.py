"""The split master keeps every bit, and its weight is the nearest bf16."""

import torch

from ptm.engine.split import join, split


def _masters() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (2**20,), dtype=torch.int64, generator=generator)
    values = bits.to(torch.int32).view(torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    values = values[values.isfinite() & (values.abs() <= largest)]
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.00390625, 1.01171875])
    return torch.cat([edges, values])


def test_halves_join_to_the_same_bits():
    masters = _masters()
    weight = torch.empty(len(masters), dtype=torch.bfloat16)
    rest = torch.empty(len(masters), dtype=torch.int16)
    split(masters.clone(), weight, rest)
    joined = join(weight, rest, torch.empty_like(masters))
    assert torch.equal(joined.view(torch.int32), masters.view(torch.int32))


def test_the_weight_is_the_nearest_and_ties_go_away_from_zero():
    masters = _masters()
    weight = torch.empty(len(masters), dtype=torch.bfloat16)
    rest = torch.empty(len(masters), dtype=torch.int16)
    split(masters.clone(), weight, rest)
    is_tie = masters.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(weight[~is_tie], masters[~is_tie].bfloat16())
    assert is_tie.any() and bool((weight[is_tie].float().abs() > masters[is_tie].abs()).all())
