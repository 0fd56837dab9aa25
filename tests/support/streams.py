"""Streams without an accelerator that are as late as they may be.

A copy is made when somebody waits for an event after it, and not before: whoever uses what it has
not waited for, or lets go of a page under a copy, comes to other numbers. Everything else happens
at once, in the order of the host; `waits` says which stream was told to wait for which.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from ptm.engine.stream import Streams


class LateEvent:
    def __init__(self, stream: LateStream, position: int) -> None:
        self.stream, self.position = stream, position

    def query(self) -> bool:
        return self.stream.num_done >= self.position

    def synchronize(self) -> None:
        self.stream.run(self.position)


class LateStream:
    def __init__(self, name: str, waits: list[tuple[str, str]]) -> None:
        self.name, self.waits = name, waits
        self.copies: deque[tuple[Tensor, Tensor]] = deque()
        self.num_done = self.num_asked = 0
        self.lock = threading.Lock()

    def record_event(self) -> LateEvent:
        return LateEvent(self, self.num_asked)

    def wait_event(self, event: LateEvent) -> None:
        self.waits.append((self.name, event.stream.name))
        event.synchronize()

    def put(self, out: Tensor, source: Tensor) -> None:
        with self.lock:
            self.copies.append((out, source))
            self.num_asked += 1

    @torch.no_grad()
    def run(self, position: int) -> None:
        with self.lock:
            while self.num_done < position:
                out, source = self.copies.popleft()
                out.copy_(source)
                self.num_done += 1


class LateStreams(Streams):
    """A device in the memory of the host."""

    has_device = True

    def __init__(self, world: int) -> None:
        self.world = world
        self.waits: list[tuple[str, str]] = []
        names = ("compute", "gather", "land", "update")
        self.compute, self.gather, self.land, self.update = (  # type: ignore[assignment]
            LateStream(name, self.waits) for name in names
        )
        self._here = threading.local()

    def current(self) -> LateStream:  # type: ignore[override]
        return getattr(self._here, "stream", self.compute)

    @contextlib.contextmanager
    def on(self, stream: LateStream) -> Iterator[None]:  # type: ignore[override]
        before = self.current()
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = before

    def copy(self, out: Tensor, source: Tensor) -> None:
        assert out.dtype == source.dtype and out.shape == source.shape, (out.shape, source.shape)
        self.current().put(out, source)

    def flush(self) -> None:
        """gloo takes what is there; a world of one sends nothing."""
        if self.world > 1:
            self._finish()

    def _finish(self) -> None:
        self.current().record_event().synchronize()

    def moved(self, tensor: Tensor, *, to_device: bool) -> Tensor:
        self._finish()
        return super().moved(tensor, to_device=to_device)

    def room(self, numel: int, dtype: torch.dtype) -> Tensor:
        kind = torch.nan if dtype.is_floating_point else 0
        return torch.full((numel,), kind, dtype=dtype)
