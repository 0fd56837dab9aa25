"""Pages of the published model on any number of ranks, and shapes that are the model's."""

from __future__ import annotations

import math

import pytest

from ptm.common.units import TIB
from ptm.engine.layout import make_layout
from ptm.model.config import ModelConfig, Scale, num_parameters
from ptm.model.transformer import Transformer
from ptm.parallel.apply import units_of
from ptm.planner import states
from ptm.planner.job import Job, shapes
from tests.planner.test_memory import SIZES, make_job

FULL = ModelConfig(scale=Scale.full)
EPS = (1, 2, 4, 8, 16, 32)


def full(ranks: int, ep: int = 1, **more: object) -> Job:
    given = {"zero": 3, "has_snapshot": False, "device": "cuda", "precision": "bf16", **more}
    return Job(
        model=FULL,
        ranks=ranks,
        ep=ep,
        seq_len=4096,
        batch_tokens=1536 * 4096,
        micro_batch_size=1,
        recompute="block",
        **given,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("ep", EPS)
def test_pages_waste_next_to_nothing(ep: int) -> None:
    """At most 1.2 % for any ranks (spec, a6); the last page of each kind is all there is."""
    for ranks in range(ep, 513, ep):
        assert states.page_map(full(ranks, ep)).waste <= 0.012, ranks


def test_two_tensors_a_page_would_waste_more() -> None:
    """In the shape of section 1.3 of the specification: 2, 23 and 97 % at 4 MiB there, where a
    layer has a matrix less and norms are left out as here."""
    assert states.angel_waste(full(8, 8)) == pytest.approx(0.02, abs=0.01)
    assert 0.2 < states.angel_waste(full(64, 8)) < 0.4
    assert 0.9 < states.angel_waste(full(256, 32)) < 1.7


@pytest.mark.parametrize("size", SIZES)
def test_shapes_are_the_models(size: str) -> None:
    model = make_job(size, "fp32", "none").model
    named = Transformer(model, device="meta").named_parameters()
    assert shapes(model) == [tuple(parameter.shape) for _, parameter in named]


@pytest.mark.parametrize("ranks, ep", [(1, 1), (3, 1), (4, 2), (4, 4), (6, 2), (64, 16)])
def test_layout_is_the_engines(ranks: int, ep: int) -> None:
    """One block counted as often as there are layers is the layout of the rank that has most."""
    job = make_job("layers", "bf16", "none", ranks=ranks, ep=ep)
    units = [(u.name, u.members) for u in units_of(Transformer(job.model, device="meta"))]
    real = [make_layout(units, world=ranks, ep=ep, rank=rank) for rank in range(ranks)]
    placed = states.layout(job)
    assert placed.numel == max(layout.numel for layout in real)
    assert [u.numel for u in placed.units] == [u.numel for u in real[0].units]
    if ep == 1:
        owned = sum(group.shard_numel for r in real for unit in r.units for group in unit.groups)
        assert owned == num_parameters(job.model)


def test_formats() -> None:
    """Bytes of a parameter: 16 with fp32 moments and the gradient sum, about 10 with int8."""
    count = num_parameters(FULL)
    for precision, is_int8, expected in (("bf16", 0, 16), ("fp32", 0, 16), ("bf16", 1, 10.0625)):
        job = full(1, precision=precision, is_int8=bool(is_int8))
        assert states.page_map(job).used_bytes / count == pytest.approx(expected, rel=1e-4)


def test_page_file_has_two_versions_of_what_lasts() -> None:
    job = full(1)
    expected = num_parameters(FULL) * (2 * 12 + 4)
    assert states.ssd_bytes(job) == pytest.approx(expected, rel=1e-3)
    assert 0.9 * TIB < states.ssd_bytes(job) < 1.1 * TIB


def test_math_of_dense_and_expert_parts() -> None:
    root, block = (states.parts(unit.groups) for unit in states.layout(full(64, 8)).units[:2])
    assert root.experts == 0 and root.dense == 135_040 * 2048 + 2048
    assert block.experts == 4 * 3 * 2048 * 8192
    assert block.numel == block.dense + block.experts
    assert math.isclose(block.dense, 33_554_432 + 8_388_608, rel_tol=0.01)
