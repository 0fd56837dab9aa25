"""How fast two ranks of this machine exchange bytes over gloo, measured in one process.

Two threads stand for the ranks; each has a gloo group of its own over the loopback device, so no
process is started and no group of a run is touched.
"""

from __future__ import annotations

import datetime
import statistics
import threading
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

now_s = time.perf_counter
_TIMEOUT = datetime.timedelta(seconds=30)


class Loopback(NamedTuple):
    bytes_per_s: float
    "That each rank sends while the other does."
    latency_s: float


def measure_loopback(num_bytes: int, repeats: int = 5) -> Loopback:
    """Medians of exchanges of `num_bytes` each way, and of almost nothing."""
    store, found = dist.HashStore(), {}  # type: ignore
    gate = threading.Barrier(2, timeout=_TIMEOUT.total_seconds())

    def rank(index: int) -> None:
        group = dist.ProcessGroupGloo(store, index, 2, _TIMEOUT)
        for size, count in ((num_bytes, repeats), (8, 20 * repeats)):
            sent = torch.zeros(2 * size, dtype=torch.uint8)
            received = torch.empty_like(sent)
            times = []
            for _ in range(count):
                gate.wait()
                started = now_s()
                group.alltoall_base(received, sent, [], []).wait()  # type: ignore
                times.append(now_s() - started)
            found[index, size] = statistics.median(times[1:])

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latency_s = max(found[0, 8], found[1, 8])
    seconds = max(found[0, num_bytes], found[1, num_bytes]) - latency_s
    return Loopback(num_bytes / max(seconds, 1e-9), latency_s)
