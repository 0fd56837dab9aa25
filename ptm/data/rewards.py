"""Rewards: plain Python callables, run in a child process that has no network and little time.

    reward(question, answer, text) -> number       answer: the row's right one, "" without

Named in a recipe as `exact`, `contains`, or `path/to/file.py:function`. The function is somebody's
program and the text is a model's: it runs in a process of its own (ptm/data/child.py) with an
alarm, a bound on memory, and, where the system lets a process give up its network, in an empty
network; everywhere Python's sockets are refused besides. A call that raises, does not return a
number (finite, of at most MOST), hangs or dies is a reward of 0 and is counted; the process is
started again. After MOST_LOST hangs and deaths in one `score` the rest is taken to be lost as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import inspect
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptm.common.errors import DataError, OutOfPages, PtmError, RecipeError, Requeue, line
from ptm.data.child import TIMED_OUT, Child

MEMORY_BYTES = 1 << 30
IMPORT_S = 10.0
MOST = 1e9
"Only differences within a group count, and sums of more are no longer numbers."
MOST_LOST = 8
"Each costs the time limit or the start of a process."
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def exact(question: str, answer: str, text: str) -> float:
    """1 for the right answer and nothing else, space around it aside."""
    return float(text.strip() == answer.strip())


def contains(question: str, answer: str, text: str) -> float:
    """1 where the right answer is anywhere in the text."""
    return float(answer.strip() in text)


BUILT_IN = {"exact": exact, "contains": contains}


class Scored(NamedTuple):
    """A reward for every text, and how many are 0 because the reward failed."""

    rewards: list[float]
    raised: int
    hung: int
    first_error: str = ""


class RewardError(DataError):
    """Every answer of a step failed."""


class _Hung(str):
    """Why there is no reward: it took too long."""


class Rewarder:
    """Scores texts in a child process; close it, or use it in a `with`."""

    def __init__(self, name: str, *, timeout_s: float, log: Path | None = None) -> None:
        """timeout_s: of one call; log: takes what the function prints. Raises: RecipeError where
        there is no such function, DataError where its file cannot be imported."""
        self.name, self.timeout_s, self.log = name, timeout_s, log
        self.child: Child | None = None
        try:
            self._call({"rows": []})
        except (DataError, OutOfPages) as error:
            if str(error).startswith("grpo.reward="):
                raise
            rule = f"its import {_rule_of(error)}"
            raise type(error)(line("grpo.reward", name, rule, "mend the file")) from None

    def score(
        self,
        rows: Sequence[tuple[str, str, str]],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Scored:
        """Rewards of (question, answer, text) rows; as soon as `is_stopped`, 0 for the rest."""
        rewards, raised, hung, first = [], 0, 0, ""
        at = lost = 0
        while at < len(rows):
            if is_stopped():
                return Scored(rewards + [0.0] * (len(rows) - at), raised, hung, first)
            if lost >= MOST_LOST:
                rest = len(rows) - at
                raised, hung = (raised, hung + rest) if hung else (raised + rest, hung)
                return Scored(rewards + [0.0] * rest, raised, hung, first)
            # One request for many rows; a hang or a death costs the row it is at, and goes on.
            done: list[Any] = []

            def take(value: Any, done: list[Any] = done) -> None:
                done.append(value)
                if is_stopped():
                    raise Requeue("asked to stop")

            try:
                self._call({"rows": [list(row) for row in rows[at:]]}, take)
            except Requeue:
                pass
            except (DataError, OutOfPages) as error:
                if len(done) == len(rows) - at:  # it died behind the last one
                    raise
                is_hang = TIMED_OUT in str(error)
                hung += is_hang
                lost += 1
                late = f"the reward took longer than {self.timeout_s:g} s"
                done.append(_Hung(late) if is_hang else f"the reward {_rule_of(error)}")
            for value in done:
                if isinstance(value, str):
                    raised += not isinstance(value, _Hung)
                    first, value = first or str(value), 0.0
                rewards.append(value)
            at = len(rewards)
        return Scored(rewards, raised, hung, first)

    def _call(self, request: dict[str, Any], report: Callable[[Any], None] = lambda _: None):
        if self.child is None:
            self.child = Child("ptm.data.rewards", memory_bytes=MEMORY_BYTES, log=self.log)
        request = {"name": self.name, "timeout_s": self.timeout_s, **request}
        # The alarm is set again before each row, in the child.
        try:
            return self.child.call(request, what="reward", time_s=IMPORT_S, report=report)
        except BaseException:  # also a signal: what it was asked then is of no more use
            self.close()
            raise

    def close(self) -> None:
        if self.child is not None:
            self.child.close()
            self.child = None

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_FUNCTIONS: dict[str, Callable[[str, str, str], Any]] = {}


def handle(request: dict[str, Any], report: Callable[[Any], None]) -> None:
    """What a `Child` runs: report each row's reward, or why there is none."""
    import signal

    name = request["name"]
    if name not in _FUNCTIONS:
        _leave_network()
        _FUNCTIONS[name] = _function(name)
    for row in request["rows"]:
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"])
        try:
            value = float(_FUNCTIONS[name](*row))
            is_fit = abs(value) <= MOST  # false for nan too
            report(value if is_fit else f"the reward is {value}, not a number of {MOST:g} at most")
        except MemoryError:
            report("the reward is out of memory")
        except Exception as error:  # whatever somebody's function can do wrong: told and counted
            report(f"the reward raised {_raised(error, name)}"[:300])


def _raised(error: Exception, name: str) -> str:
    """On one line, with the line of the reward's file that it came through last."""
    path = Path(name.rpartition(":")[0]).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text} ({Path(path).name}:{lines[-1]})" if lines else text


def _rule_of(error: PtmError) -> str:
    """What has happened to the process; the key and the remedy there are not the reward's."""
    rule = str(error)
    if rule.startswith("data="):
        rule = rule.partition(": ")[2].rpartition("; ")[0]
    return rule.removeprefix("a worker process ")


def _function(name: str) -> Callable[[str, str, str], Any]:
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, _, function = name.rpartition(":")
    remedy = f"give {', '.join(BUILT_IN)}, or path/to/file.py:function"
    if not path or not function.isidentifier():
        rule = "is neither a built-in reward nor a function in a file"
        raise RecipeError(line("grpo.reward", name, rule, remedy))
    if not Path(path).is_file():
        raise RecipeError(line("grpo.reward", name, f"there is no file {path}", remedy))
    spec = importlib.util.spec_from_file_location("reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody's file
        rule = f"cannot be imported: {_raised(error, name)}"
        raise DataError(line("grpo.reward", name, rule, "mend the file")) from None
    found = getattr(module, function, None)
    if not callable(found):
        raise RecipeError(line("grpo.reward", name, f"{path} has no function {function}", remedy))
    try:
        inspect.signature(found).bind("", "", "")
    except TypeError as error:
        rule = f"is called as {function}(question, answer, text): {error}"
        raise RecipeError(line("grpo.reward", name, rule, "mend its arguments")) from None
    except ValueError:  # what is not Python's may have no signature
        pass
    return found


def _leave_network() -> None:
    """An empty network where the system grants one, and no sockets in Python anyway."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET) != 0:
                libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("a reward has no network")

    socket.socket = refuse  # type: ignore[assignment,misc]
    socket.create_connection = refuse  # type: ignore[assignment]
