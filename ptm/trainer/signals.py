"""Asking a run to stop without losing a step.

SIGTERM (schedulers, torchrun's agent), SIGUSR1 (Slurm's early warning), SIGHUP (a lost terminal)
and SIGINT (Ctrl-C) only raise a flag in the loop. It reads it at the end of a step, after the ranks
have agreed on it, so one rank's signal stops them all at the same step; rollouts, which may take
long, do so within one too (ptm/policies.py).

Before the first step and after the last one nothing has to be finished, nor in work that is taken
up where it was left (ptm/verbs_export.py): there a signal ends the block where it arrives, and all
that is open closes on the way out. Other ranks lose this one by that, and know why from a file in
the folder of this start. A main thread that waits in C, as for a peer that does not come, runs no
handler: a thread ends the process for it. A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ptm.common import env
from ptm.common.errors import Requeue, Stopped, line

PATIENCE_S = 5.0
"How long what is open may take to close, or the main thread to come out of C."

Handler = Callable[[int, FrameType | None], None]


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


class _Asked(BaseException):
    """Passes through code that tells, translates or swallows any Exception."""


@contextmanager
def stop_requests(request: StopRequest) -> Iterator[StopRequest]:
    """For the time of the block a signal raises the flag; yields it."""
    with _handled(request._on_signal):
        yield request


@contextmanager
def leaving_at_once(request: StopRequest, rule: str, remedy: str) -> Iterator[None]:
    """For the time of the block a signal ends it, on all ranks of a machine, by Stopped with this
    line; a `stop_requests` within goes before."""
    asked = ""

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        is_first = not request  # what closes then is not disturbed
        request._on_signal(number, frame)
        if is_first:
            asked = request.signal_name
            _tell_ranks(asked)
            raise _Asked

    def ends_here(number: int) -> None:
        name = signal.Signals(number).name
        _tell_ranks(name)
        if env.ranks().rank == 0:
            print(line("signal", name, rule, remedy), file=sys.stderr, flush=True)
        os._exit(Stopped.exit_code)

    try:
        with _watched(ends_here) as wakeup_fd, _handled(leave, wakeup_fd):
            yield
    except Requeue:
        raise
    except (Exception, _Asked):  # a failure behind the signal is of what it broke off
        if name := asked or _asked_elsewhere():
            raise Stopped(line("signal", name, rule, remedy)) from None
        raise


def _tell_ranks(name: str) -> None:
    if folder := env.folder_of_ranks():
        with suppress(OSError):
            (folder / f"asked-by-{name}").touch()


def _asked_elsewhere() -> str:
    """The signal that has ended another rank of this start, as far as this one can see."""
    folder = env.folder_of_ranks()
    found = sorted(folder.glob("asked-by-*")) if folder is not None else []
    return found[0].name.removeprefix("asked-by-") if found else ""


@contextmanager
def _watched(ends: Callable[[int], None]) -> Iterator[int]:
    """Call `ends` where the block is not left PATIENCE_S after a signal. Yields where the
    interpreter is to write signals, which it does in the middle of C too."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    left = threading.Event()

    def watch() -> None:
        number = os.read(reader, 1)
        if number and not left.wait(PATIENCE_S):
            ends(number[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield writer
    finally:
        left.set()
        os.close(writer)
        thread.join()
        os.close(reader)


@contextmanager
def _handled(handler: Handler, wakeup_fd: int = -1) -> Iterator[None]:
    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.signal(number, handler) for number in caught]
    fd_before = signal.set_wakeup_fd(wakeup_fd)
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, former in zip(caught, before):
            signal.signal(number, former)
