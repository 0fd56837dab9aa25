"""Exchanges between ranks of one machine through memory that they share (csrc/shm/port.h).

    port = make_port(rank, world, timeout_s)    memory of its own, which only this process knows
    port.join(places of all ranks)              everybody's memory is mapped
    port.start(writes, reads) -> work           writes what finds room, never waits
    work.wait()                                 sleeps until all of it is there

The memory is a memfd, which has no name anywhere: peers open it through /proc/PID/fd, and when the
last process that maps it has ended, however, it is gone. Nothing is ever left in /dev/shm, whose
size does not matter either. Where peers may not look into each other's /proc (containers, other
users), `join` raises OSError.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ptm.common import env
from ptm.common.errors import RecipeError, line
from ptm.kernels import native

ROOM_BYTES = 4 * 2**20
"""Of the ring to all ranks, and of those to one each in sum. Twice that for every rank is resident
in each process; docs/numbers.md has the speed of other sizes."""
TRANSPORTS = ("memory", "gloo")


def make_port(rank: int, world: int, timeout_s: float, *, room: int = ROOM_BYTES) -> Port | None:
    """A port that has not joined; None with PTM_COLLECTIVES=gloo, without the kernel, and where
    the system gives no memory for it.

    Raises: RecipeError for another PTM_COLLECTIVES.
    """
    transport = env.collectives()
    if transport not in TRANSPORTS:
        rule = f"is one of {', '.join(TRANSPORTS)}"
        raise RecipeError(line("PTM_COLLECTIVES", transport, rule, "unset it for memory"))
    if transport == "gloo" or not native.has("shm_open") or not hasattr(os, "memfd_create"):
        return None
    try:
        return Port(rank, world, timeout_s, room=room)
    except OSError:  # no such memory for this process: a limit on files (ulimit -f), a sandbox
        return None


class SharedFile:
    """Memory without a name that other processes may map. `close` when all of them have."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._fd = os.memfd_create("ptm")
        try:
            os.ftruncate(self._fd, size)
        except OSError:
            self.close()
            raise

    @property
    def place(self) -> list[int]:
        """Where a peer finds it; the last two tell it from any other file."""
        stat = os.fstat(self._fd)
        return [os.getpid(), self._fd, stat.st_dev, stat.st_ino]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def map_file(place: Sequence[int], size: int) -> Tensor:
    """The bytes of a peer's SharedFile, (size,) uint8. Raises OSError where it cannot be opened."""
    pid, fd, device, inode = place
    file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        stat = os.fstat(file)
        if (stat.st_dev, stat.st_ino, stat.st_size) != (device, inode, size):
            raise FileNotFoundError(f"/proc/{pid}/fd/{fd} is of another process")
        return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
    finally:
        os.close(file)


class Work:
    """An exchange under way; keeps its tensors alive. `wait` before they are read or changed."""

    def __init__(self, port: Port, number: int, tensors: list[Tensor]) -> None:
        self.port, self.number, self.tensors = port, number, tensors

    def wait(self) -> None:
        """Raises RuntimeError with the peer that has left, or has not moved for the timeout."""
        self.port.wait(self.number)
        self.tensors = []


class Port:
    """One rank of a group whose ranks share a machine. Used by one thread at a time.

    Life: build -> join -> [start, wait]* -> close. All ranks start the same exchanges in the same
    order.
    """

    def __init__(self, rank: int, world: int, timeout_s: float, *, room: int = ROOM_BYTES) -> None:
        self.rank, self.world, self.timeout_s, self.room = rank, world, timeout_s, room
        self.names = [f"rank {r}" for r in range(world)]
        size = torch.empty(1, dtype=torch.int64)
        native.call("shm_bytes", world, room, size)
        self._file = SharedFile(int(size))
        self._arenas: list[Tensor] = []
        self._handle = 0
        self._exchanges = 0
        self._byte = torch.zeros(world, dtype=torch.uint8)

    @property
    def place(self) -> list[int]:
        """Where a peer finds this rank's memory."""
        return self._file.place

    def join(self, places: Sequence[Sequence[int]], names: Sequence[str] = ()) -> None:
        """Map every rank's memory. names: of the ranks, in errors. Raises OSError where one cannot
        be opened; the ports of all ranks are to be closed then."""
        self._arenas = [map_file(place, self._file.size) for place in places]
        self.names = list(names) or self.names
        watched = [_watch(pid) for pid, *_ in places]
        self._pid_fds = [fd for fd in watched if fd >= 0]
        bases, fds = (
            torch.tensor(values, dtype=torch.int64)
            for values in ([a.data_ptr() for a in self._arenas], watched)
        )
        handle = torch.empty(1, dtype=torch.int64)
        native.call("shm_open", self.rank, self.world, self.room, bases, fds, handle)
        self._handle = int(handle)

    def start(
        self, writes: Sequence[tuple[int, Tensor]], reads: Sequence[tuple[int, bool, Tensor]]
    ) -> Work:
        """writes: to one rank, or to all where it is this one. reads: from a rank, from what it
        writes to all or to this one. Tensors are contiguous, on the CPU; their bytes move."""
        flows = [[0, to, 0, t.data_ptr(), t.nbytes] for to, t in writes]
        flows += [[1, source, is_shared, t.data_ptr(), t.nbytes] for source, is_shared, t in reads]
        number, self._exchanges = self._exchanges, self._exchanges + 1
        table = torch.tensor(flows, dtype=torch.int64)
        native.call("shm_start", self._handle, number, table, len(flows))
        return Work(self, number, [t for *_, t in (*writes, *reads)])

    def wait(self, number: int) -> None:
        lost = torch.empty(2, dtype=torch.int64)
        native.call("shm_wait", self._handle, number, float(self.timeout_s), lost)
        rank, has_left = lost.tolist()
        if rank >= 0:
            why = "has left" if has_left else f"has not answered for {self.timeout_s:g} s"
            raise RuntimeError(f"{self.names[rank]} {why}")

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        others = [r for r in range(self.world) if r != self.rank]
        mine = self._byte[self.rank : self.rank + 1]
        reads = [(r, True, self._byte[r : r + 1]) for r in others]
        self.start([(self.rank, mine)], reads).wait()

    def close(self) -> None:
        """Give the memory back; peers that still wait for this rank hear that it has left."""
        if self._handle:
            native.call("shm_close", self._handle)
            self._handle = 0
            for fd in self._pid_fds:
                os.close(fd)
        self._file.close()
        self._arenas = []


def _watch(pid: int) -> int:
    """A file that can be read when the process has ended; -1 for this process, and where the system
    has none: then only the timeout tells."""
    if pid == os.getpid() or not hasattr(os, "pidfd_open"):
        return -1
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
