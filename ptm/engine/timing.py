"""When a unit's update runs, seen from the thread that trains: three answers on one seam.

    exact      a gather waits for its unit's update. Where a disk keeps the pages before the step,
               updates start in the backward already, unit by unit, on the guess that the gradient
               will not be clipped; at the end of the step the guess is checked, and where it was
               wrong the pages go back and the update is made again. Both ways give the same bits.
    bounded    the update of step k runs in the backward of step k + 1, unit by unit, after the
               unit's weights have been read for the last time and before its new gradients land.
               Every weight is exactly one step late, no update is skipped, and the disk has a
               whole step to read ahead and write behind. As exact during warm-up; afterwards the
               pages hold the weights as foreseen one update ahead (optim/adamw.py, last_lr).
    lock_free  nothing ever waits: a gather takes the weights that are there, and gradients that
               land before the last ones were used are added to them (AngelPTM's). How late weights
               were, and how many updates were merged, is counted.

    step         k: forward          k: backward               k + 1: forward    k + 1: backward
    exact        u0 u1 u2            (uL .. u0 if guessed)     u0 u1 u2
    bounded                                                                      uL .. u1 u0

In bounded and lock_free mode a commit holds the states after an update that was made, so a kill can
cost one step more of work, and a resumed run is not late in its first step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from ptm.engine.config import UpdateKind
from ptm.engine.update import Updater


class Decision(NamedTuple):
    """What a step came to for the optimizer."""

    scale: float
    lr: float
    step: int
    tokens: float


class Timing(Protocol):
    """Called by the thread that trains, with names of units."""

    @property
    def kind(self) -> object:
        """Steps of equal kind touch pages in the same order."""
        ...

    def before_gather(self, unit: str) -> None:
        """The unit's weights are about to be read."""
        ...

    def weights_read(self, unit: str) -> None:
        """The backward of a micro-batch has the unit's weights."""
        ...

    def before_landing(self, unit: str) -> bool:
        """New gradients are about to be added to the pages; whether they replace what is there."""
        ...

    def landed(self, unit: str) -> None:
        """All of a step's gradients of a unit are in its pages."""
        ...

    def decided(self, decision: Decision | None) -> None:
        """The step is over; None where it is skipped."""
        ...

    def then(self, job: Callable[[], None]) -> None:
        """Run `job` when the pages hold the states after the last decision, or an earlier one."""
        ...

    def flush(self) -> None:
        """Make every update that was decided, now."""
        ...

    def report(self) -> dict[str, float]: ...


class Exact:
    """`undo` takes all durable pages back to the last commit; None where there is none."""

    def __init__(self, updater: Updater, undo: Callable[[], None] | None) -> None:
        self.updater, self.undo = updater, undo
        self._guess: Decision | None = None
        self._used: set[str] = set()
        "Units whose gradient sums a right guess has used, or will have at the end of its updates."
        self._forgetting = threading.Lock()
        self._num_guesses = self._num_undone = 0
        self.is_likely = False

    @property
    def kind(self) -> object:
        """What the step that begins at a decision is like: where its updates are, in it."""
        return (self._guess is None, self.may_guess)

    def guess(self, decision: Decision) -> None:
        """Update in this backward, on the assumption that the step will be decided like this."""
        self._guess = decision
        self._num_guesses += 1

    @property
    def may_guess(self) -> bool:
        """Whether undoing is possible, and the step before was neither clipped nor skipped."""
        return self.undo is not None and self.is_likely

    def before_gather(self, unit: str) -> None:
        self.updater.wait(unit)
        self._forget(self._used, unit)

    def weights_read(self, unit: str) -> None: ...

    def before_landing(self, unit: str) -> bool:
        # Also of a unit that nobody gathered: forgotten later, its new sums would be.
        self.before_gather(unit)
        return True

    def landed(self, unit: str) -> None:
        if self._guess is not None:
            self._submit([unit], self._guess, discard=False)
            if self.updater.is_inline:
                self.updater.wait(unit)

    def decided(self, decision: Decision | None) -> None:
        guess, self._guess = self._guess, None
        if guess is not None:
            if guess == decision:
                self._used = set(self.updater.names)
                for unit in self.updater.names:
                    if not self.updater.is_running(unit):
                        self._forget(self._used, unit)
                return
            self.updater.drain()
            assert self.undo is not None
            self.undo()
            self._num_undone += 1
        if decision is not None:
            self._submit(self.updater.names, decision)

    def _submit(self, units: list[str], decision: Decision, discard: bool = True) -> None:
        # The sums of a guess are needed again if it was wrong.
        scale, lr, step, _ = decision
        self.updater.submit(units, scale=scale, lr=lr, step=step, discard=discard)

    def _forget(self, used: set[str], unit: str) -> None:
        with self._forgetting:
            if unit in used:
                used.discard(unit)
                self.updater.discard(unit)

    def then(self, job: Callable[[], None]) -> None:
        used = self._used  # of this step: the next makes another set

        def run() -> None:
            job()
            for unit in self.updater.names:
                self._forget(used, unit)

        self.updater.then(run)

    def flush(self) -> None:
        self.updater.drain()

    def report(self) -> dict[str, float]:
        return {
            "updates_guessed": float(self._num_guesses),
            "updates_undone": float(self._num_undone),
        }


class Bounded:
    """One step late. `num_exact` steps at first are on time."""

    def __init__(self, updater: Updater, num_exact: int) -> None:
        self.updater, self.num_exact = updater, num_exact
        self._last = 0
        "Step of the last decision."
        self._lr = self._last_lr = 0.0
        self._due: dict[str, Decision] = {}
        self._after: list[Callable[[], None]] = []
        self._waits = 0

    @property
    def kind(self) -> object:
        return self._last + 1 > self.num_exact  # of the decision that comes

    def before_gather(self, unit: str) -> None:
        self.updater.wait(unit)

    def weights_read(self, unit: str) -> None:
        decision = self._due.pop(unit, None)
        if decision is not None:
            self._submit([unit], decision)
        if not self._due:
            self._run_after()

    def before_landing(self, unit: str) -> bool:
        self.weights_read(unit)
        self.updater.wait(unit)
        return True

    def landed(self, unit: str) -> None: ...

    def decided(self, decision: Decision | None) -> None:
        if decision is None:
            return
        is_resumed, self._last = self._last == 0, decision.step
        is_first = decision.step <= self.num_exact + 1
        self._last_lr = 0.0 if is_first else decision.lr if is_resumed else self._lr
        self._lr = decision.lr
        if decision.step <= self.num_exact:
            self._submit(self.updater.names, decision)
        else:
            self._due = dict.fromkeys(self.updater.names, decision)

    def _submit(self, units: list[str], decision: Decision) -> None:
        scale, lr, step, _ = decision
        last_lr = self._last_lr if step > self.num_exact else None
        self.updater.submit(units, scale=scale, lr=lr, step=step, last_lr=last_lr)

    def then(self, job: Callable[[], None]) -> None:
        if self._due:
            self._after.append(job)
        else:
            self.updater.then(job)

    def _run_after(self) -> None:
        for job in self._after:
            self.updater.then(job)
        self._after = []

    def flush(self) -> None:
        for unit in list(self._due):
            self.weights_read(unit)
        self.updater.drain()

    def report(self) -> dict[str, float]:
        return {}


class LockFree:
    """No waiting; counts what it costs."""

    def __init__(self, updater: Updater) -> None:
        self.updater = updater
        self._pending: dict[str, Decision] = {}
        self._carried: dict[str, float] = {}
        self._applied: dict[str, int] = {}
        self._step = 0
        self._num_merged = self._num_late = self._num_gathers = self._most_late = 0

    @property
    def kind(self) -> object:
        return None

    def before_gather(self, unit: str) -> None:
        running = self.updater.is_running(unit)
        late = self._step - self._applied.get(unit, self._step) if running else 0
        self._num_gathers += 1
        self._num_late += late
        self._most_late = max(self._most_late, late)

    def weights_read(self, unit: str) -> None: ...

    def before_landing(self, unit: str) -> bool:
        pending = self._pending.pop(unit, None)
        if pending is None:
            return True
        if self.updater.cancel(unit):  # not begun: these gradients join the next ones
            self._carried[unit] = pending.tokens
            self._num_merged += 1
            return False
        self.updater.wait(unit)
        self._applied[unit] = pending.step
        return True

    def landed(self, unit: str) -> None: ...

    def decided(self, decision: Decision | None) -> None:
        if decision is None:
            return
        self._step = decision.step
        for unit in self.updater.names:
            tokens = decision.tokens + self._carried.pop(unit, 0.0)
            scale = decision.scale * decision.tokens / tokens
            merged = decision._replace(scale=scale, tokens=tokens)
            self._pending[unit] = merged
            self._applied.setdefault(unit, decision.step - 1)
            self.updater.submit([unit], scale=scale, lr=merged.lr, step=merged.step)

    def then(self, job: Callable[[], None]) -> None:
        self.updater.then(job)

    def flush(self) -> None:
        self.updater.drain()
        self._pending.clear()
        self._applied = dict.fromkeys(self.updater.names, self._step)

    def report(self) -> dict[str, float]:
        """Steps by which gathered weights were late, mean and most; updates merged into others."""
        return {
            "late_steps_mean": self._num_late / max(self._num_gathers, 1),
            "late_steps_most": float(self._most_late),
            "updates_merged": float(self._num_merged),
        }


def make_timing(
    kind: UpdateKind, updater: Updater, *, undo: Callable[[], None] | None, num_exact: int
) -> Exact | Bounded | LockFree:
    if kind is UpdateKind.exact:
        return Exact(updater, undo)
    if kind is UpdateKind.bounded:
        return Bounded(updater, num_exact)
    return LockFree(updater)
