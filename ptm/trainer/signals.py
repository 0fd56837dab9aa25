"""Asking a run to stop without losing a step.

SIGTERM (schedulers, torchrun's agent), SIGUSR1 (Slurm's early warning), SIGHUP (a lost terminal)
and SIGINT (Ctrl-C) only raise a flag. The loop reads it at the end of a step, after the ranks have
agreed on it, so one rank's signal stops them all at the same step; rollouts, which may take long,
do so within one too (ptm/policies.py). A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether, and by which signal, this rank was asked to stop."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_requests(request: StopRequest) -> Iterator[StopRequest]:
    """Install the handlers for the time of the block; yields the flag."""
    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.signal(number, request._on_signal) for number in caught]
    try:
        yield request
    finally:
        for number, handler in zip(caught, before):
            signal.signal(number, handler)
