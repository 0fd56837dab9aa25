"""One computation of `ptm bench kernels`, and how contestants are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ptm.kernels import native

Run = Callable[[], Sequence[Tensor]]


@dataclass
class Case:
    """Contestants of one computation, ours first: each a call that gives its results.

    Units: `bytes` that any implementation must read and write, `flops` it must do (0: the memory
    bounds it). `exact` gives the same results in fp64.
    """

    op: str
    what: str
    contestants: dict[str, Run]
    exact: Run
    bytes: float
    flops: float = 0.0


def with_isa(isa: str | None, run: Run) -> Run:
    """`run` served by one instruction set, or by torch."""

    def forced() -> Sequence[Tensor]:
        with native.forced(isa):
            return run()

    return forced


def ours(name: str, run: Run) -> dict[str, Run]:
    """`run` on the best instruction set, on the portable one, and by ptm's own torch."""
    found = {f"ptm {isa}": with_isa(isa, run) for isa in served(name)}
    return {**found, "ptm, torch": with_isa(None, run)}


def served(name: str) -> list[str]:
    """The different builds of a kernel that run here, best first."""
    best: dict[str, None] = {}
    for isa in reversed(native.machine()):
        with native.forced(isa):
            backend = native.backend(name)
        if backend is not None:
            best[backend] = None
    return list(best)
