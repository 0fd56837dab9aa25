"""Differences of what the engine counts: one object a group, nothing that is zero."""

from __future__ import annotations

from ptm.trainer.traffic import Traffic


def test_each_step_has_what_came_since_the_one_before() -> None:
    now = {"gather_bytes": 100.0, "pages_hits": 5.0, "pages_reads": 2.0, "update_waited_s": 0.5}
    traffic = Traffic(lambda: now)
    now |= {"gather_bytes": 170.0, "scatter_sum_bytes": 8.0, "pages_reads": 5.0, "pages_hits": 9.0}
    now |= {"pages_waited_s": 0.123456, "pages_frames": 8.0, "update_waited_s": 0.50001}
    assert traffic.take() == {
        "sent_bytes": {"gather": 70, "scatter_sum": 8},
        "pages": {"reads": 3, "hits": 4, "waited_s": 0.1235},
    }
    assert traffic.take() == {}


def test_pages_that_stay_in_memory_are_no_news() -> None:
    now = {"pages_hits": 0.0, "pages_misses": 0.0, "pages_reads": 0.0}
    traffic = Traffic(lambda: now)
    now["pages_hits"] = 300.0
    assert traffic.take() == {}


def test_lateness_and_tiers_are_as_they_are_now() -> None:
    now = {"late_steps_mean": 0.0, "late_steps_most": 0.0, "tier_cpu_bytes": 7.0}
    traffic = Traffic(lambda: now)
    late = {"late_steps_mean": 0, "late_steps_most": 0}
    assert traffic.take() == {"updates": late, "tiers": {"cpu_bytes": 7}}
    now |= {"late_steps_mean": 0.25, "late_steps_most": 1.0, "updates_merged": 2.0}
    assert traffic.take()["updates"] == {
        "late_steps_mean": 0.25,
        "late_steps_most": 1,
        "merged": 2,
    }
