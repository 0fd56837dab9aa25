"""From the trace of a step to orders: what to fetch when, and what to send away for it.

    position     0    1    2    3    4    5    6    7    (then 0 again)
    trace        A    B    C    D    C    B    A    E
                      |                        |
    frame 1      [B---B]   [D--D]  ...         [A---     A used at 6, kept to 0 of the next step
    order             `-at=1, page=D, needed_at=3, evicts=B: B is not used before 5, D is in time

1. Residency (ptm/engine/residency.py): which gaps between two uses keep their frame, by the
   eviction policy; the others cost a fetch. The trace is a circle, so one answer fits every step.
2. Pairing: each fetch takes the frame that has been free longest, so it is issued at the earliest
   position that memory allows (the second phase of Angel-PTM's scheduler, arXiv 2303.02868).
   Frames kept back from residency let fetches run further ahead, and writes beside reads, for a
   few more fetches; several numbers are tried and the shortest step wins, of those within half a
   percent of it the one that moves least: what the disk does costs the CPU too.
3. Timeline (ptm/engine/timeline.py): compute and the two links, played with these orders.

The result is data: `text()` prints it, `svg()` draws it, the store obeys it. At the start of a run
the frames are not yet what the schedule expects: an order whose page is in a frame is void, and one
whose `evicts` is not sends away what the policy says, following this Schedule's `next_use`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ptm.common.errors import OutOfPages, line
from ptm.common.units import format_bytes
from ptm.engine.config import PolicyKind
from ptm.engine.residency import Flush, Move, moves_of
from ptm.engine.timeline import Timeline, simulate
from ptm.engine.trace import Trace

_OFF = 0.10
_LEVEL = 0.005
_SPARE_SHARES = (0, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4)


class Order(NamedTuple):
    """After the access at position `at`, fetch `page` into the frame of `evicts`, which is not used
    before `page` is. Needed at position `needed_at`: of the next step when that is not after `at`.
    """

    at: int
    page: int
    needed_at: int
    evicts: int


class SectionCost(NamedTuple):
    """What one phase of one unit costs; a page is written after its last use here. A fetch that
    reads nothing is a page of scratch, which begins as zeros."""

    what: str
    num_accesses: int
    num_hits: int
    num_fetches: int
    read_bytes: int
    written_bytes: int
    work_s: float
    stall_s: float


@dataclass(frozen=True)
class Schedule:
    """Orders for every step like `trace`, and what they will cost. Made by `make_schedule`."""

    trace: Trace
    num_frames: int
    page_bytes: int
    policy: PolicyKind
    num_spare: int
    held: frozenset[int]
    "Pages that stay to the end of the step, after their last use in it."
    moves: tuple[Move, ...]
    flushes: tuple[Flush, ...]
    timeline: Timeline

    @property
    def orders(self) -> tuple[Order, ...]:
        """In the order of issue."""
        return self._orders

    @cached_property
    def _orders(self) -> tuple[Order, ...]:
        count = self.trace.num_positions
        return tuple(Order(m.at, m.page, m.needed_at % count, m.evicts) for m in self.moves)

    @property
    def num_positions(self) -> int:
        return self.trace.num_positions

    @property
    def step_s(self) -> float:
        return self.timeline.step_s

    @property
    def stall_s(self) -> float:
        return sum(self.timeline.waited_s)

    @property
    def read_bytes(self) -> int:
        return sum(move.is_read for move in self.moves) * self.page_bytes

    @property
    def written_bytes(self) -> int:
        """By evictions and commits."""
        return self.page_bytes * (sum(m.is_dirty for m in self.moves) + len(self.flushes))

    @cached_property
    def resident(self) -> frozenset[int]:
        """Pages that are in frames, or on their way, when a step begins."""
        state = dict.fromkeys(self.trace.positions, True)
        for move in self.moves:
            state[move.page], state[move.evicts] = True, False
        return frozenset(page for page, is_in in state.items() if is_in)

    def next_use(self, page: int, position: int) -> int:
        """As Trace.next_use, but a page that is fetched for that use comes a step later: sending
        it away costs nothing. NextUse that follows this agrees with the orders."""
        use = self.trace.next_use(page, position)
        if page in self.held and use >= self.num_positions:
            return self.num_positions
        return use + (self.num_positions if use % self.num_positions in self._fetched else 0)

    @cached_property
    def _fetched(self) -> frozenset[int]:
        return frozenset(order.needed_at for order in self.orders)

    def costs(self) -> list[SectionCost]:
        """Accesses, hits, bytes and seconds of each phase of each unit, in order of appearance."""
        accesses, count, size = self.trace.accesses, self.num_positions, self.page_bytes
        fetches, reads, writes = Counter[str](), Counter[str](), Counter[str]()
        stalls = {section.what: 0.0 for section in self.trace.per_unit()}
        for move in self.moves:
            what = accesses[move.needed_at % count].what
            fetches[what] += 1
            reads[what] += move.is_read
            writes[accesses[move.last_use].what] += move.is_dirty
        for flush in self.flushes:
            writes[accesses[flush.at].what] += 1
        for access, waited in zip(accesses, self.timeline.waited_s):
            stalls[access.what] += waited
        return [
            SectionCost(
                section.what,
                section.num_accesses,
                section.num_accesses - fetches[section.what],
                fetches[section.what],
                reads[section.what] * size,
                writes[section.what] * size,
                section.seconds,
                stalls[section.what],
            )
            for section in self.trace.per_unit()
        ]

    def text(self) -> str:
        """One table: a line for each phase of each unit, then the step."""
        costs = self.costs()
        head = ("phase", "unit", "accesses", "hits", "fetches", "read", "written", "work", "stall")
        rows: list[tuple[str, ...]] = [head]
        for cost in costs:
            phase, _, unit = cost.what.partition(" ")
            rows.append((phase, unit or "-", *_cells(cost)))
        total = SectionCost("", *(sum(column) for column in list(zip(*costs))[1:]))  # type: ignore[arg-type]
        rows.append(("step", "all", *(_cells(total) if costs else "-" * 7)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))
            )
            for r in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        return "\n".join([self.headline(), "", *(text.rstrip() for text in lines)])

    def headline(self) -> str:
        """The step in one sentence."""
        pages = len(self.trace.positions)
        return (
            f"{pages} pages in {self.num_frames} frames of {format_bytes(self.page_bytes)} by "
            f"{self.policy}, {self.num_spare} of them to read ahead: step {self.step_s:.3f} s, of "
            f"which {self.stall_s:.3f} s wait; {format_bytes(self.read_bytes)} read, "
            f"{format_bytes(self.written_bytes)} written"
        )

    def svg(self, path: Path) -> None:
        """Draw one step into an SVG file."""
        from ptm.engine.schedule_plot import draw

        path.write_text(draw(self))


def make_schedule(
    trace: Trace,
    *,
    num_frames: int,
    page_bytes: int,
    read_bytes_per_s: float,
    write_bytes_per_s: float,
    policy: PolicyKind | str = PolicyKind.next_use,
    num_held: int = 5,
    num_spare: int | None = None,
    scratch: Container[int] = (),
    commits: bool = False,
) -> Schedule:
    """The schedule of a step like `trace` in `num_frames` frames of memory.

    `num_held`: so many of the latest accesses may be in hand at once (an update holds an optimizer
    page with up to two pages of weights and two of gradients). `num_spare`: frames kept back for
    reading ahead; None tries several. `scratch`: pages of gradient sums, which hold nothing between
    an update and the next backward (ptm/engine/scratch.py; the store discards them). `commits`: a
    commit follows every step and writes what is dirty then, in the background.
    Raises OutOfPages when not even the pages in hand fit.
    """
    if num_frames < 1:
        rule = "needs one frame at least"
        raise OutOfPages(line("num_frames", num_frames, rule, "raise engine.cpu_bytes"))
    policy = PolicyKind(policy)
    held = max(1, min(num_held, num_frames))
    most = num_frames - held
    spares = {min(most, math.ceil(num_frames * share)) for share in _SPARE_SHARES}
    if num_spare is not None or len(trace.positions) <= num_frames:
        spares = {min(most, num_spare or 0)}
    found = []
    for spare in sorted(spares):
        moves, flushes, kept = moves_of(
            trace,
            policy=policy,
            num_frames=num_frames,
            num_spare=spare,
            num_held=held,
            scratch=scratch,
            commits=commits,
        )
        timeline = simulate(
            trace,
            moves,
            flushes,
            read_page_s=page_bytes / read_bytes_per_s,
            write_page_s=page_bytes / write_bytes_per_s,
        )
        found.append(
            Schedule(
                trace,
                num_frames,
                page_bytes,
                policy,
                spare,
                frozenset(kept),
                tuple(moves),
                tuple(flushes),
                timeline,
            )
        )
    best_s = min(schedule.step_s for schedule in found)
    level = [schedule for schedule in found if schedule.step_s <= best_s * (1 + _LEVEL)]
    return min(level, key=lambda s: (s.read_bytes + s.written_bytes, s.step_s, s.num_spare))


def needs_replan(schedule: Schedule, measured: Trace) -> bool:
    """Whether a measured step is too unlike the one that was planned for.

    True when it is another sequence of accesses; when the step with its waits took over 10 % more
    or less than predicted; or when the share of a unit's phase in the work of the step is over 10 %
    off its planned share and by over one hundredth of the step (below that a clock only shows
    noise). Plan anew with the rates measured since, or the answer stays the same.
    """
    planned = schedule.trace
    if [a[::2] for a in measured.accesses] != [a[::2] for a in planned.accesses]:
        return True
    if _is_off(measured.step_s + measured.stall_s, schedule.step_s):
        return True
    if not planned.step_s or not measured.step_s:
        return planned.step_s != measured.step_s
    for was, now in zip(planned.per_unit(), measured.per_unit()):
        before, after = was.seconds / planned.step_s, now.seconds / measured.step_s
        if _is_off(after, before) and abs(after - before) > 0.01:
            return True
    return False


def _is_off(measured: float, planned: float) -> bool:
    return abs(measured - planned) > _OFF * planned


def _cells(cost: SectionCost) -> tuple[str, ...]:
    return (
        str(cost.num_accesses),
        str(cost.num_hits),
        str(cost.num_fetches),
        format_bytes(cost.read_bytes),
        format_bytes(cost.written_bytes),
        f"{cost.work_s:.3f} s",
        f"{cost.stall_s:.3f} s",
    )
