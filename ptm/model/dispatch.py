"""The dispatcher seam: how token rows reach their experts and come back.

    y_TD = dispatcher.run(x_TD, routing, experts)

One method and not two halves around the experts, because a dispatcher may cut the rows in pieces
and let the experts of one piece compute while the next is on its way. Within it are always three
stages: dispatch (rows grouped by expert), the experts, combine (rows added up with the router's
weights, which are applied after the expert, at the token's home).

LocalDispatcher is the case of all experts on this device, and what every other must imitate: the
same rows in the same order give the same bits. Dispatchers hold no weights and nothing between
calls.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ptm.model.experts import Experts
from ptm.model.router import Routing


class Dispatcher(Protocol):
    def run(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Each token's rows after its experts, weighted and added up, (T, D)."""
        ...


class LocalDispatcher:
    def run(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """All in one op: gather, experts, weighted sum."""
        return experts(x_TD, routing.ids_TA, routing.weights_TA, routing.counts_E)
