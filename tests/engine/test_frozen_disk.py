"""Frozen weights in pages on a disk: the bits of those in memory, read and never written again."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptm.engine.config import EngineConfig
from ptm.engine.engine import PagedEngine
from ptm.engine.record import RecordLog
from ptm.model.init import new_weight
from ptm.model.lora_config import AdapterConfig, AdapterKind, Base
from ptm.quant.grid import Grid, GridKind, round_to_nearest
from ptm.quant.rows import RowFormat
from tests.support.mesh import mesh_of_test
from tests.support.paged import MODEL, make_engine, run_steps
from tests.support.ranks import run_ranks

DEEP = replace(MODEL, hidden_size=64, moe_intermediate_size=1024, num_experts=8)
DEEP = replace(DEEP, num_hidden_layers=6)
KEPT = {"page_mib": 1, "cpu_bytes": "16MiB"}


def opened(rank: int, world: int, base: Base, keys: dict[str, object]) -> PagedEngine:
    held = None if base is Base.plain else RowFormat(GridKind(base), 2)

    def initial(name: str, shape: torch.Size) -> Tensor | None:
        if held is None or not name.endswith(("experts.w1", "experts.w2")):
            return None
        whole = new_weight(DEEP, name, shape, seed=1).view(-1, shape[-1])
        return held.encode(round_to_nearest(whole, Grid(held.kind, min(128, shape[-1]))))

    return make_engine(
        mesh_of_test(rank, world, 1),
        zero=3,
        dtype=torch.bfloat16,
        config=EngineConfig(**keys),  # type: ignore[arg-type]
        model=DEEP,
        adapter=AdapterConfig(kind=AdapterKind.lora, targets=("q", "experts"), rank=2, base=base),
        held=held,
        initial=initial,
    )


def learn(
    rank: int, world: int, base: Base, keys: dict[str, object], *parts: range
) -> tuple[list[str], list[bytes], float, set[int]]:
    """Losses, states at the end, pages read in the last part, and the slots of frozen pages in the
    last record; each part in a new engine."""
    losses, bits, num_read, slots = [], [], 0.0, set()
    for steps in parts:
        engine = opened(rank, world, base, keys)
        before = engine.report()
        outcomes = run_steps(engine, engine.mesh, steps, micro_batches=2)
        losses += [o.loss.hex() for o in outcomes]
        bits = [rows.read().numpy().tobytes() for rows in engine.state().values()]
        num_read = engine.report().get("pages_reads", 0) - before.get("pages_reads", 0)
        engine.close()
        if engine.tiers.folder is not None:
            folder, weights = engine.tiers.folder, engine.pages.weights
            newest = RecordLog(folder.parent, run_id=folder.name, rank=rank).read()[-1]
            first = -(-engine.pages.trained // weights.per_page)
            slots = set(newest.slots[weights.first + first : weights.stop])
            num_frozen = weights.num_pages - first
            twice, size = len(engine.pages.durable), newest.identity.file("", "pages")
            pages = engine.pages.num_pages + twice - num_frozen
            assert (folder.parent / size).stat().st_size == pages * engine.pages.page_bytes
            assert engine.tiers.budget is not None and num_frozen > 2
            assert engine.tiers.budget.ssd_bytes == pages * engine.pages.page_bytes
    return losses, bits, num_read, slots


@pytest.mark.parametrize("world, base", [(1, Base.plain), (1, Base.int8), (2, Base.plain)])
def test_on_a_disk_they_are_what_they_are_in_memory(world: int, base: Base, tmp_path: Path) -> None:
    keys = KEPT | {"ssd_path": str(tmp_path)}
    in_memory = run_ranks(world, learn, base, {"page_mib": 1}, range(6))
    on_disk = run_ranks(world, learn, base, keys, range(3), range(3, 6))
    for (losses, bits, num_read, slots), wanted in zip(on_disk, in_memory):
        assert (losses, bits) == wanted[:2]
        assert num_read > 20, "nothing was fetched"
        assert slots == {0}  # content that changes goes to the other slot


def test_ranks_that_read_the_pages_of_others_read_frozen_weights_anew(tmp_path: Path) -> None:
    keys = {"page_mib": 1, "ssd_path": str(tmp_path / "run")}
    (tmp_path / "run").mkdir()
    run_ranks(2, learn, Base.int8, keys, range(3))
    stay = str(shutil.copytree(tmp_path / "run", tmp_path / "stay"))
    wanted = run_ranks(2, learn, Base.int8, keys | {"ssd_path": stay}, range(3, 6))
    run_ranks(1, commit_only, keys)
    found = run_ranks(2, learn, Base.int8, keys, range(3, 6))
    assert [one[:2] for one in found] == [one[:2] for one in wanted]


def commit_only(rank: int, world: int, keys: dict[str, object]) -> None:
    """Go on from the other ranks' pages and commit them here, one step later, as they are."""
    engine = opened(rank, world, Base.int8, keys)
    assert engine.restored is not None and engine.restored[0] == 3
    engine.commit(4, {"updates": engine.updates})
    engine.drain()
    engine.close()
