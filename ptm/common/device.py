"""What this process computes on, and how fast that is at best."""

from __future__ import annotations

import time

import psutil
import torch


def best_device() -> torch.device:
    """The first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device) -> int:
    """Largest memory held so far: the allocator's peak on a GPU, this process's resident memory now
    on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of a large matrix product with this process's threads: the best of repeated runs, so
    noise only lowers it.

    Measured rather than looked up, so that MFU means the same on a laptop and on a GPU.
    """
    side = 512 if device.type == "cpu" else 8192  # short, so that some run undisturbed
    a = torch.randn(side, side, device=device).to(dtype)
    torch.mm(a, a)
    best_s = float("inf")
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        sync(device)
        started = time.perf_counter()
        torch.mm(a, a)
        sync(device)
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * side**3 / best_s
