"""Jobs that end in every way a job can end; they take any config."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from typing import Any

from ptm.common import env
from ptm.common.errors import CheckpointError, DivergedError, Requeue, line


def fine(config: Any) -> None:
    print("fine")


def code_9(config: Any) -> int:
    return 9


def refused(config: Any) -> None:
    raise CheckpointError(line("run", "x", "no checkpoint", "name another"))


def diverged(config: Any) -> None:
    raise DivergedError(line("train.max_skipped", 3, "too many", "lower train.lr"))


def saved(config: Any) -> None:
    raise Requeue(line("run", "x", "saved at step 3", "start it again"))


def memory(config: Any) -> None:
    raise MemoryError


def torch_memory(config: Any) -> None:
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9"
    )


def disk_full(config: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/run/x")


def disk_full_below(config: Any) -> None:
    try:
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    except RuntimeError as e:
        raise ValueError("could not write") from e


def not_allowed(config: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", "/etc/x")


def bug(config: Any) -> None:
    raise KeyError("a\nb")


def interrupted(config: Any) -> None:
    raise KeyboardInterrupt


def not_installed(config: Any) -> None:
    import a_module_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401


def writes_much(config: Any) -> None:
    for i in range(100_000):
        print(i)


def refused_on_rank_1(config: Any) -> None:
    if env.ranks().rank == 1:
        refused(config)
    time.sleep(60)


def bug_on_rank_1(config: Any) -> None:
    if env.ranks().rank == 1:
        bug(config)
    time.sleep(60)


def killed_on_rank_1(config: Any) -> None:
    if env.ranks().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def saves_when_told(config: Any) -> None:
    def stop(number: int, frame: Any) -> None:
        raise Requeue(line("run", "x", f"saved after {signal.Signals(number).name}", "start again"))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    print(f"ready {env.ranks().rank}", flush=True)
    time.sleep(60)


def does_not_save(config: Any) -> None:
    print(f"ready {env.ranks().rank}", flush=True)
    time.sleep(60)


if __name__ == "__main__":  # launched: the first word names the job
    from ptm.cli import VERBS, main

    job = sys.argv[1]
    VERBS["train"] = VERBS["train"]._replace(job=f"tests.support.failing_jobs:{job}")
    main(["train", *sys.argv[2:]])
