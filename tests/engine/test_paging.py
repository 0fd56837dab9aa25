"""The border between two steps: who is told what, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ptm.engine.config import PolicyKind
from ptm.engine.paging import FACTOR, FIRST, Paging


class Store:
    """Notes what it is told."""

    schedule = None

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin_step(self) -> None:
        self.told.append("begin")

    def trace_into(self, callback: Any) -> None:
        self.told.append("trace" if callback else "end")

    def set_schedule(self, schedule: Any) -> None:
        self.schedule = schedule


def test_updates_of_the_step_before_are_made_before_a_trace_begins() -> None:
    store = Store()
    kinds = {
        n: SimpleNamespace(name=n, stop=i) for i, n in enumerate(("weights", "states", "grads"))
    }
    paging = Paging(
        store,  # type: ignore[arg-type]
        SimpleNamespace(page_bytes=4096, **kinds),  # type: ignore[arg-type]
        num_frames=4,
        policy=PolicyKind.next_use,
        rates=(1e9, 1e9),
        commits=True,
    )
    for step in range(1, FIRST * FACTOR + 1):
        store.told = []
        is_traced = paging.border("kind", finish=lambda: store.told.append("finish"))
        assert is_traced == (step in (FIRST, FIRST * FACTOR))
        ended = ["end"] if step == FIRST + 1 else []
        assert store.told == ended + (["finish", "begin", "trace"] if is_traced else ["begin"])
