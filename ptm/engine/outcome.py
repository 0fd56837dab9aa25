"""How a step ends, on every engine: one sum over the ranks, and the same decision on each.

Gradients are sums over tokens; they are divided once by the tokens of the whole step. A norm or a
loss that is not finite skips the update on every rank, because all of it follows from the summed
vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptm.mesh.mesh import Mesh

NORM_PIECE = 2**20
"""Elements whose squares are added up at once."""


class Outcome(NamedTuple):
    """What one step came to, equal on every rank; ptm/trainer/step.py reads it."""

    loss: float
    tokens: int
    grad_norm: float
    is_skipped: bool
    flags: list[float]
    where: str


def squares(tensors: Iterable[Tensor]) -> float:
    """Sum of squares in fp64, piece by piece: torch would widen a whole tensor at once."""
    norms = (
        float(torch.linalg.vector_norm(piece, dtype=torch.float64))
        for tensor in tensors
        for piece in tensor.reshape(-1).split(NORM_PIECE)
    )
    return sum(norm**2 for norm in norms)


def agree(
    square: float, *, nll_sum: Tensor, tokens: Tensor, flags: Sequence[float], mesh: Mesh
) -> Outcome:
    """Sum this rank's share of |gradient|^2, its loss, tokens and flags over the ranks."""
    said = torch.tensor([square, float(tokens), float(nll_sum), *flags], dtype=torch.float64)
    heard = mesh.sum_counts(said.to(mesh.device)).tolist()
    total = max(heard[1], 1.0)
    norm = math.sqrt(heard[0]) / total if heard[0] >= 0 else math.nan
    is_skipped = not (math.isfinite(norm) and math.isfinite(heard[2]))
    return Outcome(heard[2] / total, int(heard[1]), norm, is_skipped, heard[3:], "")


def clip_factor(norm: float, clip: float) -> float:
    """What gradients of that norm are multiplied with; a clip of 0 leaves them alone."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0


def where_not_finite(names: Sequence[str], grads: Sequence[Tensor | None], mesh: Mesh) -> str:
    """The first parameter with a gradient that is not finite on any rank, and how many there are.

    Taken by all ranks together, in the same order of names.
    """
    bad = [0 if g is None else int((~g.isfinite()).sum()) for g in grads]
    counts = mesh.sum_counts(torch.tensor(bad, dtype=torch.float64, device=mesh.device)).tolist()
    found = [name for name, count in zip(names, counts) if count]
    return f"{found[0]} ({len(found)} of {len(names)} parameters)" if found else "the loss"
