"""`ptm plan schedule=true`, of a plan and of a run that has happened."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from ptm.common.errors import RecipeError, StorageError
from ptm.jobs import PlanJob
from ptm.recipe import load_recipe
from ptm.verbs import plan
from tests.engine.test_terms import TERMS, step

WORDS = (
    "recipe=m32", "model.scale=debug", "model.moe_intermediate_size=256", "hardware=laptop",
    "ranks=2", "engine.zero=3", "engine.ssd_path=/disk", "engine.page_mib=1",
    "engine.cpu_bytes=34MiB", "schedule=true",
)  # fmt: skip


def ptm_plan(*words: str) -> None:
    plan(load_recipe(words, cls=PlanJob, positionals=("trace",)))


def test_of_a_run_that_has_not_happened(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "step.svg"
    ptm_plan(*WORDS, f"out={out}")
    shown = capsys.readouterr().out
    assert "memory per rank" in shown and "pages in 12 frames of 1.00 MiB by next_use" in shown
    assert "beside it: " in shown and f"drawn in {out}" in shown
    assert ElementTree.parse(out).getroot().tag.endswith("svg")


def test_of_the_traced_step_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    TERMS.save(tmp_path / "terms.json")
    step().save(tmp_path / "trace.json")
    out = f"out={tmp_path / 'step.svg'}"
    ptm_plan(str(tmp_path), out)
    assert capsys.readouterr().out.startswith(TERMS.schedule(step()).text())
    ptm_plan(str(tmp_path), out, "frames=16")
    assert "16 pages in 16 frames" in capsys.readouterr().out


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"trace=.*has no trace\.json"):
        ptm_plan(str(tmp_path))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    TERMS.save(tmp_path / "terms.json")
    step().save(tmp_path / "trace.json")
    with pytest.raises(StorageError, match="out=.*cannot be written"):
        ptm_plan(str(tmp_path), f"out={tmp_path / 'absent' / 'a.svg'}")
