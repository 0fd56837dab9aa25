"""Terms and a trace make the same schedule again, also from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptm.common.errors import DataError
from ptm.engine.config import PolicyKind
from ptm.engine.terms import Terms
from ptm.engine.trace import Trace, synthetic_trace

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
