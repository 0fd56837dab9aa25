"""What torchrun's agent does when a rank of ptm fails: leave with that rank's exit code, and say
no more than it did.

torchrun starts one agent per node, which starts the ranks. When one fails, the agent prints a
report of thirty lines and a trace of its own, and leaves with 1: the line that the rank printed
for the user is buried, and the exit code that the scheduler needs is lost. torchrun loads the
entry points of group `torchrun.handlers` (meant for rendezvous backends) when it starts, so an
installed ptm can mend this from the inside: if the agent's command line shows that its job is
ptm's, an exception hook is set that handles just two exceptions,

- ChildFailedError: leave with the code of the rank that failed first. If a signal killed it,
  nobody could say so: one line names rank, host and signal.
- SignalException, the agent itself was told to stop: it has passed the signal on and waited for
  the ranks. Leave with what they left with: 75 if they saved.

and torchrun's own log is silenced below errors of its own making (LOGLEVEL brings it back). For
any other job, and in any process that is no agent, importing this does nothing. It imports no
torch.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from ptm.common import env
from ptm.common.errors import EXIT_INTERNAL, Requeue, line

PR_SET_PDEATHSIG = 1


def rendezvous_handler() -> Any:
    """What torchrun calls after loading the entry point; installs the hook, or does nothing."""
    if is_agent_of_ptm(sys.argv):
        sys.excepthook = _leave_as_the_ranks_did
        if not env.torch_log_level():
            _quiet()
    return _no_backend


def _no_backend(params: Any) -> NoReturn:
    raise ValueError("ptm is not a rendezvous backend; use --rdzv-backend=c10d")


def stop_with_agent() -> None:
    """Have the kernel send this rank SIGTERM when its agent dies: it saves and leaves, no orphan.

    For ranks of torchrun; elsewhere it does nothing.
    """
    if env.under_torchrun():
        stop_with_parent()


def stop_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the one that started it dies, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def is_agent_of_ptm(argv: list[str]) -> bool:
    """Whether this command line starts ranks of ptm: its first script, or its module, is ptm's.

    Scripts are known by their place, launch/VERB.py beside the ptm package: they are not installed.
    """
    for i, word in enumerate(argv[1:], 1):
        if word in ("-m", "--module"):
            return argv[i + 1 : i + 2] == ["ptm"] or argv[i + 1 : i + 2] == ["ptm.cli"]
        if word.endswith(".py") and not word.startswith("-"):
            script = Path(word).absolute()
            return (
                script.parent.name == "launch" and script.is_file() and _is_ptm(script.parents[1])
            )
        if word == "--no-python" or word == "--no_python":
            return any(Path(w).name == "ptm" for w in argv[i + 1 :])
    return False


def _is_ptm(root: Path) -> bool:
    return (root / "ptm" / "common" / "agent.py").is_file()


def _leave_as_the_ranks_did(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if kind.__name__ == "ChildFailedError":
        code, message = of_failures(error.failures)  # type: ignore[attr-defined]
    elif kind.__name__ == "SignalException":
        code, message = of_signal(error.sigval, _exit_codes(trace))  # type: ignore[attr-defined]
    elif kind is KeyboardInterrupt:
        code, message = 128 + signal.SIGINT, ""
    else:
        sys.__excepthook__(kind, error, trace)
        return
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)  # an exception hook may: its code becomes the process's


def of_failures(failures: Mapping[int, Any]) -> tuple[int, str]:
    """Exit code and line when a rank did not end well; `failures` maps rank -> ProcessFailure."""

    first = min(f.timestamp for f in failures.values())

    def rank_order(rank: int) -> tuple[bool, bool, bool, bool, bool, int]:
        failure = failures[rank]
        # The agent ends the others with SIGTERM; times are whole seconds, and a rank that is killed
        # or fails makes its peers fail within the next one: with 70, as they have lost it.
        is_ended = failure.exitcode == -signal.SIGTERM
        is_later = failure.timestamp > first + 1
        may_be_lost = failure.exitcode == EXIT_INTERNAL
        is_stopped = failure.exitcode == Requeue.exit_code  # by the agent's SIGTERM, at its start
        return is_ended, is_later, may_be_lost, is_stopped, failure.exitcode > 0, rank

    rank = min(failures, key=rank_order)
    code = failures[rank].exitcode
    return (code, "") if code > 0 else (128 - code, _killed(rank, -code))


def of_signal(number: int, codes: list[int]) -> tuple[int, str]:
    """Exit code and line after the agent was told to stop, from the exit codes of its ranks."""
    failed = [c for c in codes if c > 0 and c != Requeue.exit_code]
    killed = [-c for c in codes if c < 0 and -c not in (signal.SIGTERM, number)]
    if failed:
        return failed[0], ""
    if killed:
        return 128 + killed[0], _killed(codes.index(-killed[0]), killed[0])
    if Requeue.exit_code in codes:
        return Requeue.exit_code, ""
    if codes and not any(codes):
        return 0, ""
    name = signal.Signals(number).name
    rule = "ended without saving this start's steps"
    return 128 + number, line("signal", name, rule, "the same command goes on from the last one")


def _killed(rank: int, number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = str(number)
    rule = f"rank {rank} on {socket.gethostname()} was killed"
    if number == signal.SIGKILL:
        rule += ", most likely for memory, or as it did not stop in time"
    remedy = "start it again, resume=auto goes on from the newest checkpoint"
    return line("signal", name, rule, remedy)


def _exit_codes(trace: TracebackType | None) -> list[int]:
    # The agent keeps its ranks' processes to itself, but it is `self` in a frame of the trace. If a
    # torch to come names things differently, the list is empty and the signal decides the code.
    while trace is not None:
        context = getattr(trace.tb_frame.f_locals.get("self"), "_pcontext", None)
        handlers = getattr(context, "subprocess_handlers", None)
        if handlers:
            return [
                handlers[r].proc.returncode
                for r in sorted(handlers)
                if handlers[r].proc.returncode is not None
            ]
        trace = trace.tb_next
    return []


def _quiet() -> None:
    # Each of torch's loggers has a level of its own, so a filter below them would be skipped: end
    # the way up to the console instead.
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    for name in ("torch.distributed.run", "__main__"):  # the notice about OMP_NUM_THREADS
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
