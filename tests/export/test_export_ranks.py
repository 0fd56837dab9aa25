"""`ptm export` by several ranks: the bytes of one, also where experts starve or a rank dies."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ptm.checkpoint.hf import Opened
from ptm.export.card import expert_of, starved
from ptm.export.config import ExportConfig, ExportFormat, Method
from ptm.export.crew import SPANS, Crew
from ptm.export.layer import Record
from ptm.export.m32 import M32
from ptm.export.ordinary import OrdinaryWalk
from ptm.export.quantize import export
from ptm.mesh.peers import Peers
from ptm.model.transformer import Transformer
from tests.export.test_quantize import MODEL, Weights, files_of, rows_of
from tests.support.ordinary import write_ordinary
from tests.support.ranks import RankFailed, run_ranks

ROWS: dict[str, Any] = {"group": 32, "rows": 8, "micro_batch_size": 1}


def crew_of_all() -> Crew:
    return Crew(Peers(dist.new_group(backend="gloo")))  # type: ignore[arg-type]


def m32(folder: str) -> M32:
    model = Transformer(MODEL)
    model.init_weights(seed=3)
    return M32(Opened(MODEL, Weights(model), None, Path("none"), (), Path(folder)))


def few_tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text of two words only, which most experts never see."""
    ids, documents = rows_of(count)
    return 7 + ids % 2, documents


def export_job(
    rank: int, world: int, folder: str, name: str, keys: dict, is_starving: bool = False
) -> list[Record]:
    config = ExportConfig(run=folder, out=f"{folder}/{name}", **{**ROWS, **keys})
    rows = few_tokens if is_starving else rows_of
    given = None if config.method is Method.nearest else rows
    return export(config, m32(folder), given, lambda name: None, crew=crew_of_all())[1]


@pytest.mark.parametrize(
    "keys, worlds",
    [
        ({}, (2, 3, 4)),
        ({"alpha": 0.5, "format": ExportFormat.compressed_tensors, "symmetric": False}, (2,)),
        ({"method": Method.nearest, "format": ExportFormat.fp6, "bits": "6"}, (3,)),
    ],
    ids=["gptq", "gptaq-asymmetric", "nearest-fp6"],
)
def test_any_number_of_ranks_writes_the_same_bytes(
    tmp_path: Path, keys: dict, worlds: tuple[int, ...]
) -> None:
    [records] = run_ranks(1, export_job, str(tmp_path), "one", keys)
    wanted = files_of(tmp_path / "one")
    for world in worlds:
        found = run_ranks(world, export_job, str(tmp_path), f"of-{world}", keys)
        assert files_of(tmp_path / f"of-{world}") == wanted, world
        assert found == [records] * world


def test_every_expert_is_calibrated_or_listed_where_a_third_starve(tmp_path: Path) -> None:
    [records] = run_ranks(1, export_job, str(tmp_path), "one", {}, True)
    run_ranks(2, export_job, str(tmp_path), "two", {}, True)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    experts = {expert_of(r.name): r for r in records if r.own is not None and ".w1" in r.name}
    listed = {expert_of(r.name) for r in starved(records)}
    assert len(experts) == 2 * MODEL.num_experts
    assert 0.3 * len(experts) <= len(listed) < len(experts)
    chosen = sum(r.own or 0 for n, r in experts.items() if ".layers.0." in n)
    share = chosen // MODEL.num_experts // 4  # a quarter of an even share
    assert share >= 8 * 32 * 2 // 8 // 4
    for name, record in experts.items():
        assert record.own is not None and record.rows >= share, record
        assert (record.own < share) == (name in listed), record
    card = (tmp_path / "two" / "README.md").read_text()
    assert all(f"- {name}: {experts[name].own} of " in card for name in listed)


def ordinary_job(rank: int, world: int, folder: str, kind: str, name: str, alpha: float) -> None:
    config = ExportConfig(
        run=f"{folder}/m", out=f"{folder}/{name}", alpha=alpha, method=Method.gptq, **ROWS
    )
    walk = OrdinaryWalk(Path(config.run), config.format)
    export(config, walk, rows_of, lambda name: None, crew=crew_of_all())


@pytest.mark.parametrize("kind, alpha", [("llama", 0.0), ("qwen2_moe", 0.0), ("qwen2_moe", 0.5)])
def test_ordinary_models_too(tmp_path: Path, kind: str, alpha: float) -> None:
    write_ordinary(tmp_path / "m", kind)
    for world in (1, 2):
        run_ranks(world, ordinary_job, str(tmp_path), kind, str(world), alpha)
    assert files_of(tmp_path / "2") == files_of(tmp_path / "1")


def dying_job(rank: int, world: int, folder: str, victim: int, when: int) -> None:
    """A rank that ends without a word at its `when`th linear or layer of choosing text."""
    left = [when]

    def advance(name: str) -> None:
        left[0] -= 1
        if rank == victim and left[0] < 0:
            os._exit(9)

    config = ExportConfig(run=folder, out=f"{folder}/out", **ROWS)
    export(config, m32(folder), rows_of, advance, crew=crew_of_all())


@pytest.mark.parametrize("victim, when, then", [(0, 1, 2), (1, 9, 1), (0, 25, 4), (1, 30, 2)])
def test_a_dead_rank_ends_the_others_and_any_number_goes_on(
    tmp_path: Path, victim: int, when: int, then: int
) -> None:
    run_ranks(1, export_job, str(tmp_path), "whole", {})
    started = time.monotonic()
    with pytest.raises(RankFailed) as failed:
        run_ranks(2, dying_job, str(tmp_path), victim, when)
    assert time.monotonic() - started < 60
    text = str(failed.value)
    assert f"rank {victim} of 2: died with exit code 9" in text
    assert "HangError: ranks=" in text and "a rank has left or is late" in text
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "rows-00001.safetensors").exists() == (when >= 22)
    run_ranks(then, export_job, str(tmp_path), "out", {})
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def taken_job(rank: int, world: int, folder: str) -> str:
    try:
        export_job(rank, world, folder, "taken", {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_an_error_of_the_first_rank_is_every_ranks(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    first, second = run_ranks(2, taken_job, str(tmp_path))
    assert first.startswith("CheckpointError: out=") and "is there already" in first
    assert second == f"{first} (rank 0)"


class Fake(Peers):
    """A rank of a world of which nobody else is there."""

    def __init__(self, rank: int, world: int) -> None:
        self.group, self.rank, self.world = None, rank, world


@given(world=st.integers(1, 20), count=st.integers(0, 40))
def test_every_batch_and_task_has_one_rank(world: int, count: int) -> None:
    crews = [Crew(Fake(rank, world)) for rank in range(world)]
    batches = [i for crew in crews for i in range(count)[crew.batches(count)]]
    assert batches == list(range(count))
    readers = sum(crew.batches(SPANS) != slice(0, 0) for crew in crews)
    assert readers == max(n for n in (1, 2, 4, 8) if n <= world)
    assert all(sum(crew.is_mine(i) for crew in crews) == 1 for i in range(count))
    sizes = torch.randint(0, 5, (count,))
    taken = [e for crew in crews for _, mine in crew.rounds(sizes) for e in mine]
    assert sorted(taken) == list(range(count))
    order = [int(sizes[e]) for now, _ in crews[0].rounds(sizes) for e in now]
    assert order == sorted(order, reverse=True)
