"""When pages of scratch, which hold gradient sums, hold something: from a landing to the update of
all units whose sums are in the page, and then nothing until the next backward.

Sums of a guess (ptm/engine/timing.py) are updated with in the backward and kept until the step is
decided, at its end. In the plan of such a step they are used once more there:

    forward a, b    backward b   update b   backward a   update a    end b   end a    forward a ...
                    sums of b  |-------------------------------------|
                                            sums of a  |---------------------|

Where not all of them fit until then they are planned as if their update were the end of them: those
that leave before are written and, as guesses are right most times, never read.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

from ptm.engine.follow import is_update
from ptm.engine.trace import Access, Trace

_END = "update end"


def dead_gaps(trace: Trace, scratch: Container[int]) -> set[int]:
    """Accesses after which a page of scratch holds nothing until its next use: updates after which
    no unit's sums are left; the last one in a step without updates."""
    found = set[int]()
    for page, used in trace.positions.items():
        if page not in scratch:
            continue
        uses = [trace.accesses[position].what for position in used]
        if not any(map(is_update, uses)):
            found.add(used[-1])
            continue
        left = {unit for what in uses for unit in [what.partition(" ")[2]] if not is_update(what)}
        ends = set[int]()
        for _ in range(2):  # what the step before has left is known in the second round
            ends.clear()
            for here, what, then in zip(used, uses, [*uses[1:], uses[0]]):
                unit = what.partition(" ")[2]
                (left.discard if is_update(what) else left.add)(unit)
                if is_update(what) and not left and not is_update(then):
                    ends.add(here)
        found |= ends
    return found


def sums_of_guess(trace: Trace, scratch: Container[int]) -> list[int]:
    """Pages whose sums are kept until the end of the step; none where no update is made before the
    last backward."""
    updates = [is_update(access.what) for access in trace.accesses]
    if True not in updates or False not in updates[updates.index(True) :]:
        return []
    dead, count = dead_gaps(trace, scratch), trace.num_positions
    ends = sorted(position for position in dead if trace.following[position] >= count)
    return [trace.accesses[position].page for position in ends]


def with_end(trace: Trace, pages: Sequence[int]) -> Trace:
    """The trace with one more use of each of `pages` at the end of the step."""
    ends = tuple(Access(page, trace.step_s, _END, False) for page in pages)
    return replace(trace, accesses=(*trace.accesses, *ends))
