"""When a unit's weights are wanted, and when they are not: hooks at the borders of blocks.

    root    wanted when its module (the embedding) runs, and until the next update
    block   wanted   before its forward, and when the gradient of its output is there
            not      after its forward, and when the backward has come to the block below

Nothing inside a block is hooked, so a block can be compiled or recomputed as it likes. The last
block of a forward that will be followed by a backward stays: it is the first one wanted.

The next unit in the direction of travel is gathered ahead, while this one computes, but in the
first forward after an update: there a gather waits for its unit's update, and waiting for the next
unit's would be waiting for nothing. Which gathers are made, and in which order, depends on the
sequence of forwards and backwards only, so all ranks make the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ptm.engine.weights import Weights, saved_as_places


class Hooks:
    """Installed once, on the modules of all units; units[0] is the root."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        weights: Weights,
        weights_read: Callable[[str], None],
    ) -> None:
        """weights_read: called with a unit's name when its backward has its weights."""
        self.weights, self.units, self.weights_read = weights, weights.units, weights_read
        self.is_first_forward = True
        self._saving: AbstractContextManager[Any] | None = None
        modules[0].register_forward_pre_hook(lambda module, args: self._want_root())
        for index, module in enumerate(modules[1:], start=1):
            module.register_forward_pre_hook(self._before_forward(index))
            module.register_forward_hook(self._after_forward(index), always_call=False)

    def _want_root(self) -> None:
        self.weights.phase = "forward"
        self.weights.ready(self.units[0])

    def _before_forward(self, index: int):
        def hook(module: nn.Module, args: Any) -> None:
            unit = self.units[index]
            if index == 1 and not self.weights.keep:  # what an unfinished pass has left
                for other in self.units[2:]:
                    self.weights.release(other)
            self.weights.ready(unit)
            if index + 1 < len(self.units) and not self.is_first_forward:
                self.weights.start(self.units[index + 1])
            if not self.weights.keep and module.training and torch.is_grad_enabled():
                saving = self._saving = saved_as_places(unit)
                saving.__enter__()

        return hook

    def _after_forward(self, index: int):
        def hook(module: nn.Module, args: Any, outputs: Any) -> None:
            if self._saving is not None:
                self._saving.__exit__(None, None, None)
                self._saving = None
            is_last = index == len(self.units) - 1
            if is_last:
                self.is_first_forward = False
            output = _differentiable(outputs)
            if output is None:
                if not self.weights.keep:
                    self.weights.release(self.units[index])
                return
            output.register_hook(lambda grad: self._before_backward(index))
            if not self.weights.keep and not is_last:
                self.weights.release(self.units[index])

        return hook

    def _before_backward(self, index: int) -> None:
        if not self.weights.keep:
            self.weights.phase = "backward"
            for done in self.units[index + 1 :]:
                self.weights.release(done)
            self.weights.ready(self.units[index])
            if index > 1:
                self.weights.start(self.units[index - 1])
        self.weights_read(self.units[index].unit.name)


def _differentiable(outputs: Any) -> Tensor | None:
    found = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return next((t for t in found if isinstance(t, Tensor) and t.requires_grad), None)
