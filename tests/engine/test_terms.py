"""Terms and a trace make the same schedule again, also from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ptm.common.errors import DataError
from ptm.common.units import MIB
from ptm.engine.config import EngineConfig, PolicyKind
from ptm.engine.terms import Terms
from ptm.engine.trace import Trace, synthetic_trace
from tests.support.mesh import mesh_of_test
from tests.support.paged import MODEL, make_engine, run_steps
from tests.support.ranks import run_ranks

WIDE = replace(MODEL, moe_intermediate_size=512, num_experts=8, num_hidden_layers=4)

TERMS = Terms(
    num_frames=5,
    page_bytes=1024,
    read_bytes_per_s=1e5,
    write_bytes_per_s=2e5,
    policy=PolicyKind.next_use,
    commits=True,
)


def step() -> Trace:
    phases = [(f"forward {k}", [k], False, 0.1) for k in range(8)]
    phases += [(f"backward {k}", [k, 8 + k], True, 0.2) for k in reversed(range(8))]
    return synthetic_trace(phases, [("weights", 8), ("grads", 16)])


def test_the_same_from_files(tmp_path: Path) -> None:
    TERMS.save(tmp_path / "terms.json")
    step().save(tmp_path / "trace.json")
    terms = Terms.load(tmp_path / "terms.json")
    assert terms == TERMS
    schedule = terms.schedule(Trace.load(tmp_path / "trace.json"))
    assert schedule.text() == TERMS.schedule(step()).text()
    scratch = [move for move in schedule.moves if move.page >= 8]
    assert scratch and not any(move.is_read for move in scratch)  # sums begin as zeros


def test_more_frames_read_less_and_lru_no_less() -> None:
    few = TERMS.schedule(step())
    assert TERMS.with_frames(16).schedule(step()).read_bytes == 0 < few.read_bytes
    assert TERMS.with_policy(PolicyKind.lru).schedule(step()).read_bytes >= few.read_bytes


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"num_frames": 0}', '{"policy": "lru", "x": 1}'], ids=range(5)
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "terms.json").write_text(text)
    with pytest.raises(DataError, match="does not hold the terms"):
        Terms.load(tmp_path / "terms.json")


def _leave(rank: int, world: int, folder: str, keys: dict[str, str]) -> dict[str, float]:
    mesh = mesh_of_test(rank, world)
    config = EngineConfig(page_mib=1, **keys)
    engine = make_engine(mesh, zero=3, config=config, model=WIDE)
    run_steps(engine, mesh, range(4))
    engine.leave(Path(folder))
    report = engine.report()
    engine.close()
    return report


def test_a_run_whose_pages_move_leaves_its_schedule(tmp_path: Path) -> None:
    disk, run = tmp_path / "disk", tmp_path / "run"
    disk.mkdir(), run.mkdir()
    keys = {"ssd_path": str(disk), "cpu_bytes": "28MiB"}
    (report,) = run_ranks(1, _leave, str(run), keys)
    assert report["pages_reads"] > 0 and 0 < report["tier_cpu_bytes"] <= 28 * MIB
    assert report["tier_ssd_bytes"] == sum(file.stat().st_size for file in disk.rglob("*.pages"))
    assert ElementTree.parse(run / "schedule.svg").getroot().tag.endswith("svg")
    terms, trace = Terms.load(run / "terms.json"), Trace.load(run / "trace.json")
    assert (run / "schedule.txt").read_text() == terms.schedule(trace).text()


def test_a_run_in_memory_leaves_none(tmp_path: Path) -> None:
    run_ranks(1, _leave, str(tmp_path), {})
    assert list(tmp_path.iterdir()) == []
