"""Metrics of an objective are summed over micro-batches, in the order of their names, and logged by
the mode's summary."""

from typing import Any

import torch
from torch import nn

from ptm.model.transformer import Loss
from ptm.trainer.loop import per_token
from ptm.trainer.step import train_step


class Recorder:
    """An engine that keeps what it is told."""

    model = nn.Linear(1, 1)
    flags: list[float] = []

    def backward(self, loss: torch.Tensor, **_: Any) -> None:
        pass

    def step(self, *, flags: list[float], **_: Any) -> list[float]:
        self.flags = flags
        return flags


def test_sums_over_micro_batches_in_the_order_of_names():
    def objective(model: nn.Module, batch: float) -> Loss:
        sums = {"reward": torch.tensor(batch), "kl": torch.tensor(2 * batch)}
        if batch > 1:  # a micro-batch need not have all
            del sums["kl"]
        return Loss(torch.tensor(batch), torch.tensor(3), metrics=sums)

    engine: Any = Recorder()
    train_step(
        engine,
        objective,
        [1.0, 10.0],
        lr=0.1,
        flags=[7.0],
        device=torch.device("cpu"),
        metric_names=("kl", "reward"),
    )
    assert engine.flags == [7.0, 0.0, 2.0, 11.0]


def test_the_usual_summary_divides_by_tokens():
    assert per_token({"reward": 6.0}, 3) == {"reward": 2.0}
    assert per_token({"reward": 0.0}, 0) == {"reward": 0.0}
