"""From steps to schedules: when pages move, the engine watches one step and plans the rest.

    step 1            runs as it comes: the policy alone decides what leaves
    step 2            traced: every access, in one order, with times
    from then on      the schedule fetches ahead of need on both links
    steps 16, 128, .. traced again; planned anew where times are over 10 % off

A traced step runs its updates in the thread that trains, when their weights are asked for, so that
the order of accesses is that of the work and not of two threads racing. Where all pages are in
memory nothing is traced. What is scheduled changes when pages move and never what is in them.
"""

from __future__ import annotations

from pathlib import Path

from ptm.engine.config import PolicyKind
from ptm.engine.layout import PageMap
from ptm.engine.schedule import Schedule, make_schedule, needs_replan
from ptm.engine.store import PageStore
from ptm.engine.trace import Tracer

FIRST, FACTOR, MOST = 2, 8, 1024


class Paging:
    """Called by the engine at each step's border; `schedule` is there to print and draw."""

    def __init__(
        self,
        store: PageStore,
        pages: PageMap,
        *,
        num_frames: int,
        policy: PolicyKind,
        rates: tuple[float, float],
    ) -> None:
        """rates: bytes a second that the disk reads and writes."""
        self.store, self.pages, self.num_frames, self.policy = store, pages, num_frames, policy
        self.rates = rates
        self.schedule: Schedule | None = None
        self.num_steps = 0
        self.num_plans = 0
        self._next = FIRST
        kinds = [(k.name, k.first + k.count) for k in (pages.weights, pages.states, pages.grads)]
        self._tracer = Tracer(kinds)

    def border(self) -> bool:
        """Between two steps. Returns whether the step that begins is traced."""
        if self._tracer.is_recording:
            self.store.trace_into(None)
            self._plan()
        self.num_steps += 1
        self.store.begin_step()
        if self.num_steps == self._next:
            self._next = min(self._next * FACTOR, self._next + MOST)
            self._tracer.begin()
            self.store.trace_into(self._tracer.note)
        return self._tracer.is_recording

    def _plan(self) -> None:
        trace = self._tracer.end()
        if not trace.accesses:
            return
        if self.schedule is not None and not needs_replan(self.schedule, trace):
            return
        read_rate, write_rate = self.rates
        self.schedule = make_schedule(
            trace,
            num_frames=self.num_frames,
            page_bytes=self.pages.page_bytes,
            read_bytes_per_s=read_rate,
            write_bytes_per_s=write_rate,
            policy=self.policy,
        )
        self.num_plans += 1
        self.store.set_schedule(self.schedule)

    def save(self, folder: Path) -> None:
        """Leave the schedule for people: schedule.txt, schedule.svg and the trace it is from."""
        if self.schedule is not None:
            (folder / "schedule.txt").write_text(self.schedule.text())
            self.schedule.svg(folder / "schedule.svg")
            self.schedule.trace.save(folder / "trace.json")
