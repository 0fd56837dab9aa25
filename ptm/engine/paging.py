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

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ptm.engine.config import PolicyKind
from ptm.engine.layout import PageMap
from ptm.engine.schedule import Schedule, needs_replan
from ptm.engine.store import PageStore
from ptm.engine.terms import Terms
from ptm.engine.trace import Tracer

FIRST, FACTOR, MOST = 2, 8, 1024


@dataclass
class Plan:
    """What is known of one kind of step."""

    schedule: Schedule | None = None
    num_steps: int = 0
    next_trace: int = FIRST


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
        commits: bool,
    ) -> None:
        """rates: bytes a second that the disk reads and writes; commits: after every step."""
        self.store = store
        read_rate, write_rate = rates
        self.terms = Terms(
            num_frames=num_frames,
            page_bytes=pages.page_bytes,
            read_bytes_per_s=read_rate,
            write_bytes_per_s=write_rate,
            policy=policy,
            commits=commits,
            scratch_kind=pages.grads.name,
        )
        self.num_plans = 0
        self._plans: dict[object, Plan] = {}
        self._kind: object = None
        kinds = [(k.name, k.stop) for k in (pages.weights, pages.states, pages.grads)]
        self._tracer = Tracer(kinds)

    @property
    def schedule(self) -> Schedule | None:
        """Of the kind of step that was planned last."""
        found = [plan.schedule for plan in self._plans.values() if plan.schedule is not None]
        return found[-1] if found else None

    def border(self, kind: object, *, finish: Callable[[], None]) -> bool:
        """Between two steps. Steps of one kind have the same accesses in the same order.

        finish: makes the updates of the step before, which would else run into a trace.
        Returns whether the step that begins is traced.
        """
        if self._tracer.is_recording:
            self.store.trace_into(None)
            self._plan(self._plans[self._kind])
        plan = self._plans.setdefault(kind, Plan())
        if kind != self._kind or self.store.schedule is not plan.schedule:
            self.store.set_schedule(plan.schedule)
        self._kind = kind
        plan.num_steps += 1
        is_traced = plan.num_steps == plan.next_trace
        if is_traced:
            finish()
        self.store.begin_step()
        if is_traced:
            plan.next_trace = min(plan.next_trace * FACTOR, plan.next_trace + MOST)
            self._tracer.begin()
            self.store.trace_into(self._tracer.note)
        return is_traced

    def _plan(self, plan: Plan) -> None:
        trace = self._tracer.end()
        if not trace.accesses:
            return
        if plan.schedule is not None and not needs_replan(plan.schedule, trace):
            return
        plan.schedule = self.terms.schedule(trace)
        self.num_plans += 1

    def save(self, folder: Path) -> None:
        """Leave the schedule for people: schedule.txt, schedule.svg, and the trace and terms that
        it is from."""
        if (schedule := self.schedule) is not None:
            (folder / "schedule.txt").write_text(schedule.text())
            schedule.svg(folder / "schedule.svg")
            schedule.trace.save(folder / "trace.json")
            self.terms.save(folder / "terms.json")
