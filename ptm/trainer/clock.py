"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by name since the last `take`."""

    def __init__(self) -> None:
        self.spans: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spans[name] = self.spans.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last call, in all and by span."""
        now = time.perf_counter()
        total, spans = now - self._started, self.spans
        self.spans, self._started = {}, now
        return total, spans
