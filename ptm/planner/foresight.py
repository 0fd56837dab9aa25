"""The page schedule of a run that has not happened: a step written down, not traced.

    1 each micro-batch: forward unit by unit, backward in reverse; with zero=3 both gather weights,
      but the last block stays for its backward and the first for the next forward
    2 backward adds to gradient sums: after each micro-batch, with zero=1 once a step
    3 updates unit by unit in the order in which gradients came, as where clipping is guessed

Pages are those of the rank that owns most, seconds those of the plan (ptm/planner/step_time.py)
without the disk, whose part the schedule finds. Pages on a GPU never move, so they are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ptm.common.errors import RecipeError, line
from ptm.engine.config import PolicyKind
from ptm.engine.layout import ALIGN, PageMap, Unit
from ptm.engine.terms import Terms
from ptm.engine.trace import Phase, Trace, UnitWork, synthetic_trace
from ptm.planner import states
from ptm.planner.hardware import Hardware
from ptm.planner.job import Job
from ptm.planner.price import price
from ptm.planner.speed import Speed
from ptm.planner.step_time import flops, spent, step_s

MOST_ACCESSES = 50_000
"""Of a step that is written down: more take minutes to schedule."""


class Foresight(NamedTuple):
    """A step as it would be traced, and what it is scheduled with."""

    trace: Trace
    terms: Terms
    micro_batches: int
    "Of the step; they are alike, so of very many only some are in the trace, two at least."
    num_shown: int


def foresee(job: Job, hardware: Hardware, policy: PolicyKind = PolicyKind.next_use) -> Foresight:
    """One step of the job. Raises RecipeError where nothing says how fast the machine is."""
    if (speed := hardware.speed) is None:
        rule = "says no speed, and a schedule needs seconds"
        raise RecipeError(line("hardware", hardware.name, rule, "add its section speed"))
    best = price(job, hardware)
    job, placed = best.job, best.memory.placed
    pages = states.page_map(job)
    kinds = (pages.weights, pages.states, pages.grads)
    times = spent(job, speed, placed, ranks_per_node=hardware.ranks_per_node)
    work_s = step_s(tuple(s for s in times if s.what not in ("update", "disk")))
    update_s = sum(s.seconds for s in times if s.what == "update")
    on_gpu = pages.numel * placed.gpu // max(placed.total, 1)
    units = _units(job, speed, pages, work_s=work_s, update_s=update_s, first=on_gpu)
    num_shown = _num_shown(job, units)
    trace = synthetic_trace(
        _phases(job, units, num_shown),
        [(kind.name, kind.pages(0, pages.numel).stop) for kind in kinds],
    )
    terms = Terms(
        num_frames=max(1, placed.cpu),
        page_bytes=job.page_bytes,
        read_bytes_per_s=speed.ssd_read,
        write_bytes_per_s=speed.ssd_write,
        policy=policy,
        commits=job.has_ssd and job.journal_every == 1,
        scratch_kind=pages.grads.name,
    )
    return Foresight(trace, terms, job.micro_batches, num_shown)


def _units(
    job: Job, speed: Speed, pages: PageMap, *, work_s: float, update_s: float, first: int
) -> list[UnitWork]:
    """Pages and seconds of the root and each block; elements below `first` are on the GPU."""
    placed, layers = states.layout(job), job.model.num_hidden_layers
    root, block = _owned(placed.units[0]), _owned(placed.units[1])
    times = _times(job, speed)
    scale = work_s / (job.micro_batches * times.step_s(layers))
    cuts = [0, *(min(root + k * block, pages.numel) for k in range(layers + 1))]
    found = []
    for index, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        is_root = index == 0
        share = (stop - start) / max(pages.numel, 1)
        start = min(max(start, first), stop)
        found.append(
            UnitWork(
                name="root" if is_root else f"block {index - 1}",
                weights=pages.weights.pages(start, stop),
                gradients=pages.grads.pages(start, min(stop, pages.trained)),
                updates=_updates(pages, start, stop),
                forward_s=scale * (times.root_forward if is_root else times.block_forward),
                backward_s=scale * (times.root_backward if is_root else times.block_backward),
                update_s=update_s * share,
            )
        )
    return found


def _owned(unit: Unit) -> int:
    """Elements of a unit in the rank's flat space."""
    return sum(-(-group.flat_numel(group.index) // ALIGN) * ALIGN for group in unit.groups)


def _updates(pages: PageMap, start: int, stop: int) -> list[tuple[int, range, range]]:
    found = []
    for page in pages.states.pages(start, stop):
        base = (page - pages.states.first) * pages.states.per_page
        low, high = max(start, base), min(stop, base + pages.states.per_page)
        found.append((page, pages.weights.pages(low, high), pages.grads.pages(low, high)))
    return found


class _Times(NamedTuple):
    """Of one micro-batch, in any unit: only their proportions count."""

    root_forward: float
    root_backward: float
    block_forward: float
    block_backward: float

    def step_s(self, layers: int) -> float:
        blocks = layers * (self.block_forward + self.block_backward)
        return self.root_forward + self.root_backward + blocks


def _times(job: Job, speed: Speed) -> _Times:
    again = 1 if job.recompute == "block" else 0
    if (timed := speed.timed) is not None:
        forward, backward = timed.block_forward_s, timed.block_backward_s
        return _Times(
            timed.root_forward_s, timed.root_backward_s, forward, backward + again * forward
        )
    costs = {kind: n / speed.rate(job.precision, kind) for kind, n in flops(job).items()}
    head = costs.pop("head")
    block = sum(costs.values()) / job.model.num_hidden_layers
    return _Times(head, 2 * head, block, (2 + again) * block)


def _num_shown(job: Job, units: Sequence[UnitWork]) -> int:
    update = sum(1 + len(w) + len(g) for unit in units for _, w, g in unit.updates)
    one = sum(2 * len(unit.weights) + len(unit.gradients) for unit in units)
    return min(job.micro_batches, max(2, (MOST_ACCESSES - update) // max(one, 1)))


def _phases(job: Job, units: Sequence[UnitWork], micro_batches: int) -> Iterator[Phase]:
    (root, *blocks), last = units, micro_batches - 1
    for micro in range(micro_batches):
        gathers = micro == 0 or job.zero == 3
        if micro == 0:
            yield "forward root", root.weights, False, 0.0
        for unit in blocks:
            stays = micro > 0 and unit is blocks[0]
            weights = unit.weights if gathers and not stays else ()
            yield f"forward {unit.name}", weights, False, unit.forward_s
        yield "forward root", (), False, root.forward_s + root.backward_s
        lands = job.zero != 1 or micro == last
        for unit in reversed(blocks):
            weights = unit.weights if job.zero == 3 and unit is not blocks[-1] else ()
            yield f"backward {unit.name}", weights, False, unit.backward_s
            yield f"backward {unit.name}", unit.gradients if lands else (), True, 0.0
        yield "backward root", root.gradients if lands else (), True, 0.0
    for unit in (*reversed(blocks), root):
        if not unit.updates:
            yield f"update {unit.name}", (), True, unit.update_s
        for states_page, weights, grads in unit.updates:
            what = f"update {unit.name}"
            yield what, (states_page,), True, 0.0
            yield what, weights, True, 0.0
            yield what, grads, False, unit.update_s / len(unit.updates)
