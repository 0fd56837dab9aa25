"""What torch's CPU allocator held at most, counted by the profiler allocation by allocation.

Every allocation inside an operator is seen, also those of a backward written by hand; memory that
libraries take for themselves (oneDNN's kernels, gloo's buffers) is not. What was left behind by
others is collected first: freed while counting, it would count as negative.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile


class Held:
    """Filled when `count_bytes` ends."""

    most_bytes = 0
    """Largest sum at any moment, above what was held at the start."""
    end_bytes = 0
    """What is left at the end."""


@contextmanager
def count_bytes() -> Iterator[Held]:
    held = Held()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        yield held
    result = seen.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in result.events() if e.name() == "[memory]"]
    assert changes, "the profiler saw no allocation"
    for _, num_bytes in sorted(changes, key=lambda change: change[0]):
        held.end_bytes += num_bytes
        held.most_bytes = max(held.most_bytes, held.end_bytes)
