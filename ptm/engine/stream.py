"""The order of work on an accelerator: streams, events, and copies that the host does not wait for.

    stream    what runs there                                  and only after
    current   forward and backward                             the gather of the unit
    gather    weights, from pages into a unit's frame          the frame's last use, the update
    land      gradient sums, into pages or on to the host      the backward of the unit
    update    the optimizer over pages in device memory        all of a step's gradients landed

Streams and events are torch's; without an accelerator there is one order, that of the host, and all
of this is nothing. tests/support/streams.py has a stand-in whose copies happen as late as their
events allow, so that whoever forgets to wait finds other numbers.

NOT MEASURED: none of the CUDA half has run on a device. How much of the copies hides behind
computing, whether a page a copy reaches the rate of the link, and whether three streams beside
NCCL's get in each other's way are open.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 2**16
"""Elements worked on at once: the fp32 copies of a chunk stay in a core's second-level cache."""


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Stream(Protocol):
    """Work in one order."""

    def record_event(self) -> Event: ...

    def wait_event(self, event: Event) -> None: ...


class Now:
    """The stream of a host without an accelerator, and its events: all is done at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def record_event(self) -> Event:
        return self

    def wait_event(self, event: Event) -> None: ...


class Streams:
    """Streams of one rank; this one is of a host without an accelerator."""

    has_device = False
    device = torch.device("cpu")
    chunk = CHUNK
    "Elements of pages in device memory that are worked on at once; a multiple of CHUNK."

    def __init__(self) -> None:
        self.gather: Stream = Now()
        self.land: Stream = self.gather
        self.update: Stream = self.gather

    def current(self) -> Stream:
        """The stream to which this thread's work goes."""
        return self.gather

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """This thread's work goes to `stream`."""
        del stream
        return nullcontext()

    def copy(self, out: Tensor, source: Tensor) -> None:
        """Copy between tensors of one type on the current stream; on the host both are page-locked.
        They must stay as they are until an event that is recorded afterwards is done."""
        out.copy_(source)

    def flush(self) -> None:
        """Before a collective that takes what this stream has copied; NCCL's keep the order."""

    def moved(self, tensor: Tensor, *, to_device: bool) -> Tensor:
        """A copy in the other memory, done on return."""
        return tensor.to(self.device if to_device else "cpu", copy=True)

    def room(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that `copy` can go to."""
        return torch.empty(numel, dtype=dtype)


class CudaStreams(Streams):
    """Three streams beside the current one."""

    has_device = True
    chunk = 2**20
    "Kernels on a CPU's chunk would take less time than their launches; not measured."

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gather, self.land, self.update = (torch.cuda.Stream(device) for _ in range(3))  # type: ignore[assignment]

    def current(self) -> Stream:
        return torch.cuda.current_stream(self.device)  # type: ignore[return-value]

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)  # type: ignore[arg-type]

    def copy(self, out: Tensor, source: Tensor) -> None:
        out.copy_(source, non_blocking=True)

    def room(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, pin_memory=True)


HOST = Streams()


def streams_of(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else HOST
