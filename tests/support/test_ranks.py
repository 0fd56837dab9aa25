"""run_ranks gives back every result, and never hides or waits for a failure."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankFailed, run_ranks


def total(rank: int, world: int, start: int) -> int:
    value = torch.tensor(start + rank)
    dist.all_reduce(value)
    return int(value)


def one_raises(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("planted")
    dist.barrier()


def one_dies(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(7)
    dist.barrier()


def one_hangs(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(600)


def alone(rank: int, world: int) -> bool:
    return dist.is_initialized()


@pytest.mark.parametrize("world", [1, 3])
def test_results_come_back_in_order(world: int) -> None:
    want = sum(10 + r for r in range(world))
    assert run_ranks(world, total, 10) == [want] * world


def test_no_process_group_on_request() -> None:
    assert run_ranks(1, alone, process_group=False) == [False]


@pytest.mark.parametrize(
    "job, match",
    [
        (one_raises, "rank 1 of 2: (?s:.*)planted"),
        (one_dies, "exit code 7"),
        (one_hangs, "still running"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_failure_of_one_rank_is_raised_soon(job, match: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match=match):
        run_ranks(2, job, timeout_s=8.0)
    assert time.monotonic() - started < 30
