"""What a run is, beside its tensors: a handful of numbers that a checkpoint carries and a resume
restores.

There is no random state in it: seeds are functions of (seed, step, rank), and the order of data is
one of (seed, step). What can be derived is not stored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch


@dataclass
class TrainState:
    """Counters after `step` whole steps."""

    run_id: str
    step: int = 0
    updates: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    "The lowest so far of what the mode calls its best (Run.best_key)."

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        values = {"best": values.get("best_bits_per_byte"), **values}  # its name before modes
        return cls(**{f.name: values[f.name] for f in fields(cls)})


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step on one rank: dropout is the same after a resume."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)
