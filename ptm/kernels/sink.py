"""Where a weight's gradient goes, for a kernel that can put it there itself.

An engine that adds up gradients in buffers of its own sets `param.grad_sink`. A kernel that finds
one writes or adds there, and gives autograd an empty sparse tensor in the gradient's place: so the
gradient is neither rounded, nor copied, nor held twice, and autograd's own join of several uses of
a weight still says when all have come. Whoever reads `param.grad` then finds it sparse and empty,
or dense where another use of the weight made an ordinary gradient besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class GradSink(Protocol):
    def room(self) -> tuple[Tensor, bool] | None:
        """The tensor that takes the gradient, and whether it is added to what is there; None where
        an ordinary gradient is wanted. What is asked for is filled before autograd goes on."""
        ...


class Rooms(NamedTuple):
    """Of several weights; `adds` holds for all."""

    into: tuple[Tensor, ...]
    adds: bool


def sinks_of(*weights: Tensor) -> list[GradSink] | None:
    """Of weights in use; None unless all are parameters that have one."""
    found = [getattr(weight, "grad_sink", None) for weight in weights]
    return None if None in found else found  # type: ignore[return-value]


def rooms_of(sinks: Sequence[GradSink] | None) -> Rooms | None:
    """Rooms of all, once per use of the weights, in the backward."""
    found = [sink.room() for sink in sinks or ()]
    if not found or None in found:
        return None
    into, adds = zip(*found)  # type: ignore[arg-type]
    assert len(set(adds)) == 1, "weights of one op are added up together"
    return Rooms(into, adds[0])


def put(weight: Tensor) -> Tensor:
    """What autograd gets for a gradient that is in its room."""
    places = torch.empty(weight.dim(), 0, dtype=torch.int64, device=weight.device)
    return torch.sparse_coo_tensor(
        places, weight.new_empty(0), weight.shape, check_invariants=False
    )
