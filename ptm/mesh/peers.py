"""Ranks that agree on something slow and rare: what was saved, whether a checkpoint is good.

Values travel as JSON in byte tensors, so nothing is unpickled. `together` is the whole idea: each
rank does its part, then all learn every result, or all raise the same error. Without it one rank
would fail while the others wait for it in their next collective.

The group must be used by one thread at a time and by nothing else meanwhile: `Mesh.background`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ptm.common.errors import HangError, PtmError, StorageError, line


class Peers:
    """The ranks of a gloo group; of None, a world of one that needs no process group at all."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.world = 1 if group is None else group.size()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order. Raises HangError if a peer is gone or late."""
        if self.world == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        try:
            sizes = torch.zeros(self.world, dtype=torch.int64)
            sizes[self.rank] = data.numel()
            dist.all_reduce(sizes, group=self.group)
            padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
            padded[: data.numel()] = data
            rows = [torch.empty_like(padded) for _ in range(self.world)]
            dist.all_gather(rows, padded, group=self.group)
        except RuntimeError as error:
            raise lost(error) from error
        return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes.tolist())]

    def together(self, task: Callable[[], Any]) -> list[Any]:
        """Run `task` on every rank and return all results (JSON values), in rank order.

        Raises, on every rank, when a task failed anywhere: on a rank that failed its own error, on
        the others one of the same PtmError type. HangError as `gather`.
        """
        failure: Exception | None = None
        value = None
        try:
            value = task()
        except Exception as error:  # not swallowed: raised below, after the others know of it
            failure = error
        kind = _kind(failure).__name__ if failure is not None else ""
        heard = self.gather([kind, str(failure) if failure is not None else value])
        for rank, (name, text) in enumerate(heard):
            if not name:
                continue
            if rank == self.rank and failure is not None:
                raise failure
            where = f" (rank {rank})" if self.world > 1 else ""
            raise _kind_named(name)(f"{text}{where}") from failure
        return [text for _, text in heard]


def lost(error: Exception) -> HangError:
    """What a failed collective means: a peer has left, or did not answer in time."""
    why = re.sub(r"^\[[^\]]*\] ", "", str(error)).splitlines()[
        0
    ]  # gloo begins with its own source line
    remedy = "see what the other ranks printed; start again to go on from the last checkpoint"
    return HangError(line("ranks", why, "a rank has left or is late", remedy))


def _kind(error: Exception) -> type[Exception]:
    if isinstance(error, PtmError):
        return type(error)
    return StorageError if isinstance(error, OSError) else PtmError


def _kind_named(name: str) -> type[PtmError]:
    kinds: list[type[PtmError]] = [PtmError]
    for kind in kinds:  # grows while it is walked: all subclasses, wherever they are declared
        if kind.__name__ == name:
            return kind
        kinds += kind.__subclasses__()
    return PtmError
