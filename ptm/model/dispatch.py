"""The dispatcher seam: how token rows reach their experts and come back.

    dispatched = dispatcher.dispatch(x_TD, routing)        rows grouped by expert
    y_RD       = experts(dispatched.x_RD, dispatched.counts_e)
    y_TD       = dispatcher.combine(y_RD, dispatched.receipt)

LocalDispatcher is the case of all experts on this device, and what every other must imitate: the
same rows in the same order give the same bits. Dispatchers hold no weights and nothing between
calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ptm.kernels.permute import combine, grouped_rows, permute, slots
from ptm.model.router import Routing


class Dispatched(NamedTuple):
    """Shapes: x (R, D) grouped by local expert as ptm/kernels/permute.py lays rows out; counts (e,)
    without zero rows."""

    x_RD: Tensor
    counts_e: Tensor
    receipt: Any
    "What `combine` needs of the way there; nobody else reads it."


class Dispatcher(Protocol):
    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, y_RD: Tensor, receipt: Any) -> Tensor: ...


class LocalDispatcher:
    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Copy each token into the groups of its experts."""
        slots_TA = slots(routing.ids_TA, routing.counts_E)
        num_rows = grouped_rows(slots_TA.numel(), routing.counts_E.numel())
        x_RD = permute(x_TD, slots_TA, num_rows)
        return Dispatched(x_RD, routing.counts_E, (slots_TA, routing.weights_TA))

    def combine(self, y_RD: Tensor, receipt: tuple[Tensor, Tensor]) -> Tensor:
        """Add up each token's rows with the router's weights, which are applied after the
        expert."""
        slots_TA, weights_TA = receipt
        return combine(y_RD, slots_TA, weights_TA)
