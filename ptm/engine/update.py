"""The update: the optimizer over pages, a unit at a time, in a thread of its own.

    for each page of states, for each chunk of it:
        master   = join(weight, rest)          in cache, 64 k elements at a time
        gradient = sum x scale                 scale = clipping / tokens of the step
        update(master, gradient, moments)      the recipe's rule, a pure function
        weight, rest = split(master)

Where the rule has a `sweep`, that does all of it in one visit of the page, with the same bits.

Units are updated in the order in which the next forward needs them, and a gather waits for its own
unit only, so the update hides behind data loading, the evaluation's start and the forward of
earlier units. Nothing in the result depends on when it ran.

Chunks whose states are in device memory are updated there, on a stream of its own, in the same
order: this thread then only starts kernels, and a gather waits for them in its stream. The host
writes no page before the device has read what it was asked to until the update was submitted.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ptm.engine.layout import Group, Layout, Unit
from ptm.engine.states import PagedStates, Room
from ptm.engine.stream import CHUNK, HOST, Event

Update = Callable[..., None]
"""`update(param, grad=, exp_avg=, exp_avg_sq=, step=, lr=, decay=, last_lr=)` on flat fp32
ranges; optim.adamw is one. It may have a `sweep(stored, grad, scale=, step=, lr=, middle=,
last_lr=) -> bool` besides, as optim.AdamW has."""


@torch.no_grad()
def update_group(
    states: PagedStates,
    group: Group,
    update: Update,
    room_at: Callable[[int], Room],
    *,
    scale: float,
    lr: float,
    step: int,
    last_lr: float | None = None,
) -> None:
    """One update of this rank's shard of a group from the gradient sums in its pages."""
    pages, sweep = states.pages, getattr(update, "sweep", None)
    first, last = group.base, group.base + group.shard_numel
    matrices = max((slot.stop for slot in group.slots if slot.decays), default=0)
    boundary = group.flat(min(max(matrices, group.first), group.last))
    kinds = (pages.weights, pages.states, pages.grads)
    with (
        states.weights(write=True) as weights,
        states.states(write=True) as opt,
        states.grads() as grads,
    ):
        for start, stop in states.ranges(first, last, *kinds, wide=True):
            count, room = stop - start, room_at(start)
            grad = states.gradient(grads, start, count)
            middle = min(max(boundary, start), stop) - start
            if sweep is not None and (stored := states.stored(weights, opt, start, count)):
                values = {"scale": scale, "step": step, "lr": lr, "last_lr": last_lr}
                if sweep(stored, grad, middle=middle, **values):
                    continue
            grad = torch.mul(grad, scale, out=room.grad[:count])
            master = states.master(weights, opt, start, count, room.master)
            moments = states.moments(opt, start, count, room.moments)
            for part, decay in ((slice(0, middle), True), (slice(middle, count), False)):
                if part.stop > part.start:
                    update(
                        master[part],
                        grad=grad[part],
                        exp_avg=moments.exp_avg[part],
                        exp_avg_sq=moments.exp_avg_sq[part],
                        step=step,
                        lr=lr,
                        decay=decay,
                        last_lr=last_lr,
                    )
            states.put_moments(opt, start, moments)
            states.put_master(weights, opt, start, master)


class Updater:
    """Runs updates of units in a thread. `wait(unit)` before its weights are read, `drain` for all.

    ahead: how many units of the forward the updates may be ahead of the gathers, so that what an
    update has in memory is still there for its gather; None lets them run. `is_inline` runs each
    update when it is waited for, in the thread that waits, so that a trace has one order.
    """

    def __init__(
        self, layout: Layout, states: PagedStates, update: Update, *, ahead: int | None
    ) -> None:
        self.states, self.update, self.ahead = states, update, ahead
        self.is_inline = False
        self._units = {unit.name: unit for unit in layout.units}
        self.names = list(self._units)
        self._streams = states.streams
        self._host_room = Room.of(CHUNK, HOST.device)
        has_device = any(states.resident)
        self._device_room = (
            Room.of(self._streams.chunk, self._streams.device) if has_device else self._host_room
        )
        self._done: dict[str, Event] = {}
        "Of each unit's last update on the device."
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ptm-update")
        self._running: dict[str, Future[None] | Callable[[], None]] = {}
        self._jobs: deque[Future[None]] = deque()
        self._inline: deque[Callable[[], None]] = deque()
        self._asked = threading.Condition()
        self._reached = -1
        self.waited_s = 0.0

    def submit(
        self,
        units: Sequence[str],
        *,
        scale: float,
        lr: float,
        step: int,
        last_lr: float | None = None,
        discard: bool = True,
    ) -> None:
        """Start the updates of `units`, in this order. None of them may be under way.

        discard: the gradient sums are of no use afterwards, so their pages need not be kept.
        last_lr: as the update rule has it, for gradients that are a step late.
        """
        if self.is_inline:  # what was to come after the updates before comes before these
            self.finish_jobs()
        is_whole = list(units) == self.names
        self._reached = -1 if is_whole else len(self.names)
        for index, name in enumerate(units):
            assert name not in self._running, f"{name} is being updated"
            unit = self._units[name]
            asked = self._streams.current().record_event()
            values = {"scale": scale, "lr": lr, "step": step, "last_lr": last_lr}
            job = functools.partial(self._run, asked, index, unit, discard, **values)
            self._running[name] = job if self.is_inline else self._thread.submit(job)

    def then(self, job: Callable[[], None]) -> None:
        """Run `job` after all updates that were submitted. Raises what earlier jobs raised."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()
        if self.is_inline and self._running:
            self._inline.append(job)
        else:
            self._jobs.append(self._thread.submit(job))

    def _room_at(self, at: int) -> Room:
        return self._device_room if self.states.on_device(at) else self._host_room

    def _run(
        self,
        asked: Event,
        index: int,
        unit: Unit,
        discard: bool,
        **values: Any,
    ) -> None:
        ahead = self.ahead
        if ahead is not None and not self.is_inline:
            with self._asked:
                self._asked.wait_for(lambda: self._reached >= index - ahead)
        self.states.store.note(f"update {unit.name}")
        streams = self._streams
        with streams.on(streams.update):
            streams.update.wait_event(asked)
            for group in unit.trained:
                if not self.states.is_resident(group.base, group.base + group.shard_numel):
                    asked.synchronize()
                update_group(self.states, group, self.update, self._room_at, **values)
            self._done[unit.name] = streams.update.record_event()
        if discard:
            self.discard(unit.name)

    def discard(self, name: str) -> None:
        """Forget the gradient pages that hold nothing but this unit's sums, which were used: they
        need not be written when they leave memory. Its next gradients must not have landed."""
        if self.ahead is None:
            return
        groups = self._units[name].trained
        if not groups:
            return
        start, stop = groups[0].base, groups[-1].base + groups[-1].shard_numel
        kind = self.states.pages.grads
        first, last = -(-start // kind.per_page), stop // kind.per_page
        self.states.store.discard(range(kind.first + first, kind.first + max(first, last)))

    def is_running(self, unit: str) -> bool:
        running = self._running.get(unit)
        return running is not None and not (isinstance(running, Future) and running.done())

    def cancel(self, unit: str) -> bool:
        """Take back an update that has not begun; False where it has."""
        running = self._running.get(unit)
        if isinstance(running, Future) and running.cancel():
            del self._running[unit]
            return True
        return False

    def wait(self, unit: str) -> None:
        """Until the unit's last update is done on the host; on the device what this thread's stream
        gets next comes after it. Raises what it raised."""
        running = self._running.pop(unit, None)
        if running is not None:
            self._finish(unit, running)
        if unit in self._done:
            self._streams.current().wait_event(self._done[unit])

    def _finish(self, unit: str, running: Future[None] | Callable[[], None]) -> None:
        self._reach(max(self._reached, self.names.index(unit)))
        if isinstance(running, Future):
            started = time.perf_counter()
            running.result()
            self.waited_s += time.perf_counter() - started
        else:
            running()
        while self._inline and not self._running:
            self._inline.popleft()()

    def drain(self) -> None:
        """Until nothing is under way."""
        self._reach(len(self.names))
        for name in self.names:
            self.wait(name)
        self.finish_jobs()

    def finish_jobs(self) -> None:
        """Until all jobs that `then` took have run. Raises what they raised."""
        while self._jobs:
            self._jobs.popleft().result()

    def close(self) -> None:
        self._reach(len(self.names))
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _reach(self, index: int) -> None:
        with self._asked:
            self._reached = index
            self._asked.notify()
