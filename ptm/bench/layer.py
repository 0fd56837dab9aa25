"""The experts of one layer over ranks, without the model around them: what a rank of `ptm bench
experts` runs in place of training. Rows, and experts that they go to, are drawn by chance, with a
seed for each rank; gradients of weights are added up in fp32 rooms, as the engine has them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptm.mesh.mesh import Mesh
from ptm.model.dispatch import LocalDispatcher
from ptm.model.experts import Experts
from ptm.model.router import Routing
from ptm.parallel.expert import AllToAllDispatcher, dispatcher_for, local_experts
from ptm.recipe import Recipe


class Room:
    """A GradSink that is added to."""

    def __init__(self, weight: Tensor) -> None:
        self.sum = torch.zeros(weight.shape)

    def room(self) -> tuple[Tensor, bool]:
        return self.sum, True


class Layer:
    """In the place of an engine. Calls are as many as the model has layers in a micro-batch.

    is_sent: rows are sent, whatever the axis shares. is_alone: nothing is, and each rank's experts
    take its own rows, as many as would come in the mean: the same work without the others.
    """

    def __init__(
        self, recipe: Recipe, mesh: Mesh, *, is_sent: bool = False, is_alone: bool = False
    ) -> None:
        config, train = recipe.model, recipe.train
        E, A = config.num_experts, config.num_experts_per_tok
        self.calls_of_pass, self.calls = config.num_hidden_layers, 0
        mine = local_experts(mesh, E)
        self.experts = Experts(config)
        draw = torch.Generator().manual_seed(mesh.rank)
        for name in ("w1", "w2"):
            shape = getattr(self.experts, name)[mine].shape
            weight = nn.Parameter(0.05 * torch.randn(shape, generator=draw).bfloat16())
            weight.grad_sink = Room(weight)  # type: ignore[attr-defined]
            setattr(self.experts, name, weight)
        T, D = train.micro_batch_size * train.seq_len, config.hidden_size
        self.x_TD, self.grad_TD = (torch.randn(T, D, generator=draw).bfloat16() for _ in range(2))
        ids = torch.rand(T, E, generator=draw).argsort(1)[:, :A]
        self.dispatcher = dispatcher_for(mesh, E)
        if is_sent:
            self.dispatcher = AllToAllDispatcher(mesh, E)
        if is_alone:
            self.dispatcher, E = LocalDispatcher(), E // mesh.ep.size()
            ids = ids % E
        weights = torch.rand(T, A, generator=draw)
        self.routing = Routing(ids, weights, torch.bincount(ids.flatten(), minlength=E), weights)

    def train(self, passes: int) -> float:
        """Forward and backward of every layer's experts, so many times; the norm of y, to compare
        what contestants compute."""
        norm = 0.0
        for _ in range(passes * self.calls_of_pass):
            x_TD = self.x_TD.detach().requires_grad_()
            weights = self.routing.weights_TA.detach().requires_grad_()
            y_TD = self.dispatcher.run(
                x_TD, self.routing._replace(weights_TA=weights), self.experts
            )
            y_TD.backward(self.grad_TD)
            self.experts.zero_grad()
            norm = y_TD.detach().float().norm().item()
            self.calls += 1
        return norm

    def report(self) -> dict[str, float]:
        return {"calls": float(self.calls)}

    def drain(self) -> None:
        pass
