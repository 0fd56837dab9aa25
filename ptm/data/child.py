"""Runs a module's `handle(request, report)` in another process, over JSON lines on its pipes.

For work that should use another core (tokenizing, ptm/data/shard.py) or must not be able to hurt
this process (chat templates, ptm/data/chat.py). A fresh interpreter, so no lock or thread of this
process is copied into it. The child ends when its pipe closes, that is also when its parent is
killed; Ctrl-C is the parent's to handle. It leads a session of its own, and what it has started
ends with it. A time limit is an alarm inside the child: it fires in the middle of a C loop as well,
and when nobody is left to watch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ptm.common.errors import DataError, OutOfPages, PtmError, RecipeError, StorageError, line

ROOT = str(Path(__file__).resolve().parents[2])
ERRORS = {e.__name__: e for e in (DataError, RecipeError, StorageError, OutOfPages, PtmError)}
TIMED_OUT, CRASHED = "took too long", "crashed its process"


class Child:
    """One process, ready for many calls, one at a time; `close` it or use it in a `with`.

    `memory_bytes` bounds its address space; `log` takes what it prints, in place of the terminal.
    """

    def __init__(self, module: str, *, memory_bytes: int = 0, log: Path | None = None) -> None:
        # Found where this file is, and not in the current folder, which may hold a json.py.
        code = (
            f"import sys; sys.path = [{ROOT!r}, *filter(None, sys.path)]; import ptm.data; "
            f"del sys.path[0]; from ptm.data.child import serve; serve({module!r}, {memory_bytes})"
        )
        command = [sys.executable, "-c", code]
        with contextlib.ExitStack() as stack:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if log is None else stack.enter_context(log.open("ab")),
                start_new_session=True,
            )

    def call(
        self,
        request: dict[str, Any],
        *,
        what: str,
        time_s: float = 0.0,
        report: Callable[[Any], None] = lambda _: None,
    ) -> Any:
        """The result of `handle(request, report)`; `what` is what it works on, for error messages.

        Raises: what `handle` raises; DataError when the child runs out of `time_s` (0 is no limit)
        or dies; OutOfPages when the system killed it. After a death this child is of no more use.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its death is told below
            self.process.stdin.write(_line({"time_s": time_s, "request": request}))
            self.process.stdin.flush()
        with _going_on(self.process.pid) if time_s else contextlib.nullcontext():
            for text in self.process.stdout:
                reply = json.loads(text)
                if "report" in reply:
                    report(reply["report"])
                elif "error" in reply:
                    raise ERRORS.get(reply["error"], PtmError)(reply["message"])
                else:
                    return reply["result"]
        code = self._end()
        if code == -signal.SIGKILL:
            rule = "a worker process was killed, most likely for want of memory"
            raise OutOfPages(line("data", what, rule, "set data.workers=1 or free memory"))
        if code == -signal.SIGALRM:
            raise DataError(line("data", what, f"{TIMED_OUT} ({time_s:g} s)", "simplify it"))
        raise DataError(line("data", what, f"{CRASHED} (exit {code})", "leave it out"))

    def _end(self) -> int:
        """Wait for the process, and end what it has started; its exit code."""
        if self.process.returncode is None:
            # Not reaped before its session has ended: until then nobody else has its number.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self._end()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _going_on(pid: int) -> Iterator[None]:
    """A process that stops itself hears no alarm: inside, it is told to go on each second."""
    is_over = threading.Event()

    def tell() -> None:
        while not is_over.wait(1.0):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def serve(module: str, memory_bytes: int) -> None:
    """The child's side: answer requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies, requests = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)  # what a library prints must not get among the replies
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    me = os.getpid()

    def send(reply: dict[str, Any]) -> None:
        if os.getpid() != me:  # a copy that somebody's function made, and came back in
            os._exit(0)
        try:
            replies.write(_line(reply))
            replies.flush()
        except BrokenPipeError:
            _leave(me)

    handle = importlib.import_module(module).handle
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    for text in requests:
        message = json.loads(text)
        signal.setitimer(signal.ITIMER_REAL, message["time_s"])
        try:
            result = {"result": handle(message["request"], lambda value: send({"report": value}))}
        except MemoryError:
            result = {"error": "OutOfPages", "message": "a worker process is out of memory"}
        except PtmError as e:
            result = {"error": type(e).__name__, "message": str(e)}
        except OSError as e:
            where = e.filename or "the cache"
            rule = f"cannot be written ({e.strerror or e})"
            storage = line("data.cache_dir", where, rule, "free or change the disk")
            result = {"error": "StorageError", "message": storage}
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(result)
    _leave(me)


def _leave(me: int) -> None:
    """The parent is gone: so is what was started here."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(me, signal.SIGKILL)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
