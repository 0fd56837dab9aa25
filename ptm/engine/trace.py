"""One step seen from the pages: which page was used when, for what, and whether it was written.

Steps of a training run are alike, so the trace of one is the future of all that follow: it is read
as a circle, its last access followed by its first. A `Tracer` records it while the engine runs; its
times leave out the waiting for pages, because a schedule shall decide anew who waits. A trace can
also be written down without running (`synthetic_trace`, `step_phases`), to plan a machine that is
not here.

    forward A      forward B      backward B        backward A        update A         update B
    W0 W1          W2 W3          W2 W3 .. G        W0 W1 .. G        O W G, O W G     O W G
    |--------------|--------------|-----------------|-----------------|----------------|--------> s
"""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ptm.common.errors import DataError, line

FORMAT = 1


class Access(NamedTuple):
    """One use of a page. `what` is a phase and a unit, like "forward block 3"."""

    page: int
    at_s: float
    what: str
    is_write: bool


class Section(NamedTuple):
    """All that one phase does for one unit in a step; seconds of work follow their access."""

    what: str
    num_accesses: int
    num_writes: int
    seconds: float


@dataclass(frozen=True)
class Trace:
    """Accesses of one step in order. Made by a Tracer or `synthetic_trace`, never changed.

    `step_s` is the length of the step without the waits for pages, which add up to `stall_s`.
    `kinds` names ranges of pages, each by its name and the first page after it.
    """

    accesses: tuple[Access, ...]
    step_s: float
    stall_s: float = 0.0
    kinds: tuple[tuple[str, int], ...] = ()

    @property
    def num_positions(self) -> int:
        return len(self.accesses)

    @cached_property
    def positions(self) -> dict[int, list[int]]:
        """Page -> where it is used, ascending; pages in order of their first use."""
        found: dict[int, list[int]] = {}
        for position, access in enumerate(self.accesses):
            found.setdefault(access.page, []).append(position)
        return found

    @cached_property
    def following(self) -> list[int]:
        """For each access the next one of its page, in (position, position + num_positions]."""
        following = [0] * len(self.accesses)
        for used in self.positions.values():
            for here, there in zip(used, [*used[1:], used[0] + len(self.accesses)]):
                following[here] = there
        return following

    def next_use(self, page: int, position: int) -> int:
        """First use of `page` after `position`, beyond the end of the step if need be; a page that
        is not in the trace comes after all others."""
        count = len(self.accesses)
        used = self.positions.get(page)
        if used is None:
            return position + 3 * count
        index = bisect_right(used, position)
        return used[index] if index < len(used) else used[0] + count

    def work_s(self) -> list[float]:
        """Seconds from each access to the one after it (the last: to the end of the step)."""
        ends = [*(access.at_s for access in self.accesses[1:]), self.step_s]
        return [end - access.at_s for access, end in zip(self.accesses, ends)]

    def per_unit(self) -> list[Section]:
        """What each phase does for each unit, in order of first appearance."""
        sections: dict[str, Section] = {}
        for access, seconds in zip(self.accesses, self.work_s()):
            _, count, writes, total = sections.get(access.what, ("", 0, 0, 0.0))
            sections[access.what] = Section(
                access.what, count + 1, writes + access.is_write, total + seconds
            )
        return list(sections.values())

    def kind_of(self, page: int) -> str:
        """Name of the range that holds `page`; "pages" outside of all."""
        return next((name for name, stop in self.kinds if page < stop), "pages")

    def save(self, path: Path) -> None:
        """Write as JSON, times to the microsecond; about four bytes an access."""
        micros = [round(access.at_s * 1e6) for access in self.accesses]
        runs = [(what, len(list(run))) for what, run in groupby(a.what for a in self.accesses)]
        record = {
            "format": FORMAT,
            "step_us": round(self.step_s * 1e6),
            "stall_us": round(self.stall_s * 1e6),
            "kinds": self.kinds,
            "pages": [access.page for access in self.accesses],
            "after_us": [b - a for a, b in zip([0, *micros], micros)],
            "what": runs,
            "writes": "".join("01"[access.is_write] for access in self.accesses),
        }
        path.write_text(json.dumps(record, separators=(",", ":")))

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what `save` wrote. Raises DataError when it is something else."""
        try:
            record = json.loads(path.read_text())
            assert record["format"] == FORMAT
            whats = [what for what, count in record["what"] for _ in range(count)]
            accesses, micros = [], 0
            columns = zip(record["pages"], record["after_us"], whats, record["writes"], strict=True)
            for page, after, what, write in columns:
                micros += after
                accesses.append(Access(int(page), micros / 1e6, what, write == "1"))
            kinds = tuple((str(name), int(stop)) for name, stop in record["kinds"])
            step_s, stall_s = record["step_us"] / 1e6, record["stall_us"] / 1e6
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            rule = "is no trace that this version wrote"
            raise DataError(line("trace", path, rule, "record it anew")) from error
        return cls(tuple(accesses), step_s, stall_s, kinds)


class Tracer:
    """Records one step: `begin`, then `note` at every use from any thread, then `end`.

    Notes outside of begin and end are dropped, so the store may note always.
    """

    def __init__(self, kinds: Iterable[tuple[str, int]] = ()) -> None:
        self._kinds = tuple(kinds)
        self._lock = threading.Lock()
        self._notes: list[Access] | None = None
        self._began_s = self._waited_s = self._latest_s = 0.0

    @property
    def is_recording(self) -> bool:
        return self._notes is not None

    def begin(self) -> None:
        with self._lock:
            self._notes, self._waited_s, self._latest_s = [], 0.0, 0.0
            self._began_s = time.perf_counter()

    def note(self, page: int, is_write: bool, what: str, waited_s: float = 0.0) -> None:
        """A page is in hand now, after `waited_s` seconds of waiting for it."""
        with self._lock:
            if self._notes is not None:
                self._waited_s += waited_s
                self._notes.append(Access(page, self._now(), what, is_write))

    def end(self) -> Trace:
        """Close the step and give its trace."""
        with self._lock:
            assert self._notes is not None, "end() without begin()"
            notes, self._notes = tuple(self._notes), None
            return Trace(notes, self._now(), round(self._waited_s, 6), self._kinds)

    def _now(self) -> float:
        # Threads that wait at once would be deducted twice; time never runs backwards here.
        now = time.perf_counter() - self._began_s - self._waited_s
        self._latest_s = max(self._latest_s, round(now * 1e6) / 1e6)
        return self._latest_s


Phase = tuple[str, Sequence[int], bool, float]


def synthetic_trace(phases: Iterable[Phase], kinds: Iterable[tuple[str, int]] = ()) -> Trace:
    """The trace of (what, pages, is_write, seconds): a phase uses its pages, then works."""
    accesses: list[Access] = []
    now_s = 0.0
    for what, pages, is_write, seconds in phases:
        accesses += [Access(page, now_s, what, is_write) for page in pages]
        now_s += seconds
    return Trace(tuple(accesses), now_s, 0.0, tuple(kinds))


@dataclass(frozen=True, kw_only=True)
class UnitWork:
    """Pages of one unit, and how long the unit works in each phase (forward, backward: for one
    micro-batch; update: in all). `updates` holds, for each optimizer page, the weight pages and
    the gradient pages of the same elements."""

    name: str
    weights: Sequence[int]
    gradients: Sequence[int]
    updates: Sequence[tuple[int, Sequence[int], Sequence[int]]]
    forward_s: float
    backward_s: float
    update_s: float


def step_phases(units: Sequence[UnitWork], *, micro_batches: int = 1) -> list[Phase]:
    """What one step of the paged engine does, for `synthetic_trace`.

    1. Each micro-batch: forward unit by unit, then backward in reverse, each of which reads the
       weights; backward adds to the gradient sums at its end.
    2. The update, unit by unit: an optimizer page with the weights and gradients beside it.
    """
    phases: list[Phase] = []
    for _ in range(micro_batches):
        phases += [(f"forward {u.name}", u.weights, False, u.forward_s) for u in units]
        for unit in reversed(units):
            phases.append((f"backward {unit.name}", unit.weights, False, unit.backward_s))
            phases.append((f"backward {unit.name}", unit.gradients, True, 0.0))
    for unit in units:
        for optimizer, weights, gradients in unit.updates:
            what, seconds = f"update {unit.name}", unit.update_s / len(unit.updates)
            phases.append((what, [optimizer], True, 0.0))
            phases.append((what, weights, True, 0.0))
            phases.append((what, gradients, False, seconds))
    return phases
