"""What the tests of compiled kernels share: the instruction sets to try, poisoned memory, errors.

Use `@each_isa` on a test that takes `isa`; it then runs once per set under `native.forced`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ptm.kernels import native

each_isa = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(
            isa,
            marks=pytest.mark.skipif(
                isa not in native.machine(), reason=f"no library, or this CPU has no {isa}"
            ),
        )
        for isa in native.ISAS
    ],
)
needs_library = pytest.mark.skipif(not native.machine(), reason="no library: csrc/build.py")


def error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected; NaN in `found` is infinite."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    off = (found.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    return float("inf") if off != off else off / scale if scale else off


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every new tensor with NaN (ids with the largest number), so that what is not written
    shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        probe = torch.empty_like(torch.zeros(3)), torch.zeros(3).new_empty(3), torch.empty(3)
        assert all(t.isnan().all() for t in probe)
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def same_bits(run: Callable[[], list[Tensor]]) -> None:
    """`run` gives the same bits twice, and with 1, 2 and 3 threads."""
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 1, 2, 3):
            torch.set_num_threads(n)
            results.append([t.detach().clone() for t in run()])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
