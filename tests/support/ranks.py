"""Run a function on n ranks: n processes on this machine joined by gloo.

    def job(rank: int, world: int, folder: str) -> float: ...   # top of a module: importable
    results = run_ranks(2, job, "/some/folder")                 # [rank 0's result, rank 1's]

Ranks are forked from a server that has imported torch once, so a world starts in a fraction of a
second. Each has a default process group (set `process_group=False` for a job that makes its own,
or dies on purpose). A rank that fails ends the others after a short grace, and the traceback of
every failed one is raised; a rank that hangs prints its stacks and is ended at the timeout.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

GRACE_S = 5.0
# DTensor imports torch._dynamo at its first use, and job modules import pytest: 0.8 s a rank.
PRELOAD = ("torch.distributed.tensor", "torch.distributed.checkpoint", "torch._dynamo", "pytest")


class RankFailed(AssertionError):
    """At least one rank raised, died or hung; the text has all of them."""


def run_ranks(
    n: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0, process_group: bool = True
) -> list[Any]:
    """Call fn(rank, n, *args) on n ranks, return results in order. Arguments must pickle."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    with tempfile.TemporaryDirectory(prefix="ptm-ranks-") as folder:
        init = f"file://{folder}/rendezvous" if process_group else None
        ranks = []
        for rank in range(n):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=_main, args=(send, fn, rank, n, args, init, timeout_s), daemon=True
            )
            process.start()
            send.close()
            ranks.append((process, receive))
        try:
            return _collect(ranks, timeout_s)
        finally:
            for process, receive in ranks:
                process.kill()
                process.join()
                receive.close()


def _collect(ranks: list[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending: dict[Connection, int] = {receive: rank for rank, (_, receive) in enumerate(ranks)}
    deadline = time.monotonic() + timeout_s
    while pending and time.monotonic() < deadline:
        for receive in wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
            rank = pending.pop(receive)  # type: ignore[call-overload]
            try:
                is_good, value = receive.recv()  # type: ignore[union-attr]
            except EOFError:
                ranks[rank][0].join(GRACE_S)
                is_good, value = False, f"died with exit code {ranks[rank][0].exitcode}"
            if is_good:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if not failures and not pending:
        return [results[rank] for rank in range(len(ranks))]
    for rank in pending.values():
        failures[rank] = "still running when time was up"
    raise RankFailed(
        "\n".join(f"rank {r} of {len(ranks)}: {text}" for r, text in sorted(failures.items()))
    )


def _main(
    send: Connection,
    fn: Callable[..., Any],
    rank: int,
    world: int,
    args: tuple[Any, ...],
    init: str | None,
    timeout_s: float,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(max(1.0, timeout_s - 1.0), exit=False)
    try:
        if init is not None:
            timeout = datetime.timedelta(seconds=timeout_s)
            dist.init_process_group(
                "gloo", init_method=init, rank=rank, world_size=world, timeout=timeout
            )
        send.send((True, fn(rank, world, *args)))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        send.send((False, traceback.format_exc()))
    finally:
        faulthandler.cancel_dump_traceback_later()
        send.close()
