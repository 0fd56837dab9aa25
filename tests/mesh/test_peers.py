"""Ranks that agree: all have every result, or all have the error, of one type and with one text."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from ptm.common.errors import CheckpointError, HangError, PtmError, StorageError
from ptm.mesh.peers import Peers
from tests.support.ranks import run_ranks


class LateKind(CheckpointError):
    """A kind of error that ptm/common does not know."""


def gather_job(rank: int, world: int) -> list[Any]:
    peers = Peers(dist.new_group(backend="gloo"))
    assert (peers.rank, peers.world) == (rank, world)
    return peers.gather({"rank": rank, "text": "ü" * (100 * rank), "none": None, "x": [0.1]})


@pytest.mark.parametrize("world", [1, 3])
def test_every_rank_hears_every_value(world: int) -> None:
    wanted = [{"rank": r, "text": "ü" * (100 * r), "none": None, "x": [0.1]} for r in range(world)]
    assert run_ranks(world, gather_job) == [wanted] * world


def test_a_world_of_one_needs_no_process_group() -> None:
    assert Peers().together(lambda: 5) == [5]
    with pytest.raises(KeyError):
        Peers().together(lambda: {}["x"])


def error_job(rank: int, world: int) -> list[tuple[str, str, int]]:
    peers, found = Peers(dist.new_group(backend="gloo")), []
    for planted in (LateKind("a=1: b; c"), OSError(28, "full"), KeyError("k")):

        def task(error: Exception = planted) -> None:
            if rank == 1:
                raise error

        with pytest.raises((PtmError, OSError, KeyError)) as caught:
            peers.together(task)
        code = getattr(caught.value, "exit_code", 0)
        found.append((type(caught.value).__name__, str(caught.value), code))
    assert peers.together(lambda: rank) == list(range(world)), "and they go on together"
    return found


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    others, failed, third = run_ranks(3, error_job)
    assert failed[0] == ("LateKind", "a=1: b; c", 4) and failed[1][0] == "OSError"
    assert others == third
    assert others[0] == ("LateKind", "a=1: b; c (rank 1)", 4)
    assert others[1] == (StorageError.__name__, "[Errno 28] full (rank 1)", 74)
    assert others[2] == (PtmError.__name__, "'k' (rank 1)", 70)


def late_job(rank: int, world: int) -> float:
    peers = Peers(dist.new_group(backend="gloo", timeout=timedelta(seconds=2)))
    if rank == 1:
        time.sleep(4)
    started = time.monotonic()
    with pytest.raises(HangError, match="a rank has left or is late"):
        peers.gather(rank)
    return time.monotonic() - started


def test_a_late_rank_is_an_error_within_the_timeout() -> None:
    assert max(run_ranks(2, late_job, timeout_s=30)) < 10
