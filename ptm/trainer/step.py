"""One optimizer step: micro-batches forward and backward, then the engine's reduce, clip, guard and
update.

The Engine seam is declared here, where it is consumed; ptm/engine/ and ptm/parallel/ implement it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ptm.engine.state import StateRows
from ptm.trainer.objectives import Objective


class Outcome(Protocol):
    """What `Engine.step` came to, equal on every rank. `flags` are the given ones summed over
    ranks."""

    @property
    def loss(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def is_skipped(self) -> bool: ...
    @property
    def flags(self) -> list[float]: ...
    @property
    def where(self) -> str: ...


class Engine(Protocol):
    """Owner of weights, gradients and optimizer states of one model over all ranks."""

    model: nn.Module
    updates: int

    @property
    def restored(self) -> tuple[int, dict[str, Any]] | None:
        """The step whose states the engine found on its own disk, and the meta of its commit."""
        ...

    @property
    def has_frozen(self) -> bool:
        """Whether it found frozen weights there too; they are then not filled again."""
        ...

    def restore(self) -> None:
        """Make the states those of `restored`."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every parameter by name."""
        ...

    def fill(self, name: str, value: Tensor) -> None:
        """Set one parameter's master from a whole fp32 tensor that every rank holds."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool, tokens: Tensor, lr: float) -> None:
        """Add the gradients of `loss`, a sum over tokens, to this step's.

        is_last: of this rank's micro-batches in the step; tokens: of this and those before; lr: of
        the step. With the last, an engine may begin to update.
        """
        ...

    def step(self, *, nll_sum: Tensor, tokens: Tensor, lr: float, flags: list[float]) -> Outcome:
        """Update the weights with the gradients since the last step, unless one is not finite."""
        ...

    def state(self) -> dict[str, StateRows]:
        """Live masters and moments by name; written in place by a load, then `publish`."""
        ...

    def publish(self) -> None:
        """Make the weights of forward and backward equal to the masters."""
        ...

    def drain(self) -> None:
        """Wait for updates that go on behind the next step's start."""
        ...

    def commit(self, step: int, meta: dict[str, Any]) -> None:
        """Make this step one to come back to after a kill, where the engine keeps such."""
        ...

    def report(self) -> dict[str, float]:
        """Bytes sent by kind, and what the tiers did, since the start."""
        ...

    def leave(self, folder: Path) -> None:
        """Files for people about how this rank moved its states, where it did; on rank 0."""
        ...

    def close(self, *, is_failing: bool = False) -> None:
        """End threads, and let go of memory and files. is_failing: wait for no peer."""
        ...


def train_step(
    engine: Engine,
    objective: Objective,
    batches: Sequence[Any],
    *,
    lr: float,
    flags: list[float],
    device: torch.device,
    metric_names: Sequence[str] = (),
) -> Outcome:
    """Run one step over this rank's micro-batches: as many on every rank, some maybe without
    rows.

    The outcome's flags are those given, the balance loss, and the metrics of `metric_names`, all
    summed over the micro-batches of all ranks.
    """
    nll_sum = torch.zeros((), dtype=torch.float64, device=device)
    aux_sum = torch.zeros((), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    metrics = torch.zeros(len(metric_names), dtype=torch.float64, device=device)
    engine.model.train()
    for i, batch in enumerate(batches, start=1):
        loss = objective(engine.model, batch)
        nll_sum += loss.nll_sum.detach()
        if loss.aux_sum is not None:
            aux_sum += loss.aux_sum.detach()
        tokens += loss.tokens
        for j, name in enumerate(metric_names):
            if name in loss.metrics:
                metrics[j] += loss.metrics[name].detach()
        engine.backward(loss.total, is_last=i == len(batches), tokens=tokens, lr=lr)
    flags = [*flags, float(aux_sum), *metrics.tolist()]
    return engine.step(nll_sum=nll_sum, tokens=tokens, lr=lr, flags=flags)
