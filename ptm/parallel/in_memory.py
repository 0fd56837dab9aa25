"""The experts of other ranks of one machine, without sending rows: memory that the ranks share
holds the tokens of all, and each rank's experts read their rows, and write what they make of them,
where the rank of the tokens has them.

    home of the tokens            shared memory                rank of the experts
    x_TD -------- copied -------> x
                  ids ----------> ids        -- told --------> which rows are mine
                                  x          -- gathered ----> experts
    y_TD <------- combined ------ rows      <-- told --------- each to its place

In the backward, weighted rows of the gradient lie in `rows`, and are overwritten by those of x's.
An expert's rows come by (source rank, token order) and are combined in the order of a token's
experts, as those of AllToAllDispatcher: the bits are its bits. Only rows are not sent; ranks tell
each other of theirs twice a pass, in 8 bytes to each of the others, through the group's port
(ptm/mesh/shared.py), which is also what sleeps, names a rank that is gone, and orders memory.

Why nobody writes over what is still read: a rank's x, ids and rows change when it starts a pass,
and by then it has heard from all others that their experts are done with the pass before; its rows
are written by others between its two words, when it does not touch them.

The windows (ptm/kernels/moe_ep_mlp.py) hold as many tokens as any rank has had in a call; all ranks
learn the numbers of all in the first word, and so grow them together. A pass keeps those that its
forward has used. A rank whose rows or experts the kernel does not serve says so there, and all take
`otherwise`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptm.kernels.moe_ep_mlp import Windows, added, combined, rows_for, spread, window_bytes
from ptm.kernels.moe_mlp import backward_in_place, forward_in_place, plan_windows, puts_gradients
from ptm.kernels.shm import SharedFile, map_file
from ptm.kernels.sink import put, rooms_of, sinks_of
from ptm.mesh.collectives import Pending
from ptm.mesh.mesh import Mesh
from ptm.mesh.peers import Peers
from ptm.mesh.shared import port_of
from ptm.model.dispatch import Dispatcher
from ptm.model.experts import Experts
from ptm.model.router import Routing

CANNOT = -1


class InMemoryDispatcher:
    """Experts of other ranks where they lie. Made by `dispatcher_for`, where the ep axis has a
    port. NOTE the stacked weights are used as they are: `experts.forward` is not called."""

    def __init__(self, mesh: Mesh, num_experts: int, otherwise: Dispatcher) -> None:
        self.group, self.ledger = mesh.ep.get_group(), mesh.ledger
        self.rank, self.num_ranks = mesh.ep.get_local_rank(), mesh.ep.size()
        others = [r for r in range(self.num_ranks) if r != self.rank]
        self.words_N = torch.zeros(self.num_ranks, dtype=torch.int64)
        word_of = self.words_N.split(1)
        self.writes = [(r, word_of[self.rank]) for r in others]
        self.reads = [(r, False, word_of[r]) for r in others]
        port = port_of(self.group)
        assert port is not None
        self.port = port
        self.num_experts, self.otherwise = num_experts, otherwise
        self.windows: Windows | None = None

    @property
    def experts(self) -> slice:
        local = self.num_experts // self.num_ranks
        return slice(self.rank * local, (self.rank + 1) * local)

    def run(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """As LocalDispatcher, with `experts` holding this rank's only."""
        w1, w2 = experts.w1, experts.w2
        used = self._publish(x_TD, routing.ids_TA, is_served=puts_gradients(x_TD, w1, w2))
        if used is None:
            return self.otherwise.run(x_TD, routing, experts)
        assert self.windows is not None
        kept_here = int(routing.counts_E[self.experts].sum())
        visit = Visit(self, self.windows, used, kept_here)
        return _Visit.apply(x_TD, routing.weights_TA, w1, w2, visit)  # type: ignore[return-value]

    @torch.no_grad()
    def _publish(self, x_TD: Tensor, ids_TA: Tensor, *, is_served: bool) -> Tensor | None:
        """Lay rows and ids out for the others; how many ids there are of each rank, (N,)."""
        (T, active), dim = ids_TA.shape, x_TD.shape[1]

        def lay_out(windows: Windows) -> None:
            windows.x_of(self.rank, T).copy_(x_TD)
            windows.ids_of(self.rank, T).copy_(ids_TA)

        if is_served and self.windows and self.windows.holds(T, active, dim):
            lay_out(self.windows)
        tokens = self.tell(T if is_served else CANNOT)
        if CANNOT in tokens:
            return None
        used_N, most = tokens * active, int(tokens.max())
        if not (self.windows and self.windows.holds(most, active, dim)):
            self.windows = self._open(rows_for(most), active, dim)
            lay_out(self.windows)
            self.tell(T)
        self.count("all_to_all_ids", len(self.reads) * ids_TA.nbytes)
        return used_N

    def _open(self, *shape: int) -> Windows:
        """New windows, mapped by all ranks; called by all."""
        peers, size = Peers(self.group), window_bytes(self.num_ranks, *shape)
        file = SharedFile(size) if self.rank == 0 else None
        place = peers.gather(file and file.place)[0]
        mapped: list[Tensor] = []
        try:
            peers.together(lambda: mapped.append(map_file(place, size)))
        finally:
            if file is not None:
                file.close()
        return Windows(mapped[0], self.num_ranks, *shape)

    def tell(self, number: int) -> Tensor:
        """Give each other a number, and wait for all: (N,), until the next time. What each has
        written before can be read after it."""
        self.start_telling(number).wait()
        return self.words_N

    def start_telling(self, number: int) -> Pending:
        name = "all_to_all_counts"
        self.words_N[self.rank] = number
        self.count(name, len(self.reads) * self.words_N.element_size())
        with self.ledger.waiting(name):
            work = self.port.start(self.writes, self.reads)
        return Pending(name, self.ledger, (work,))

    def count(self, name: str, num_bytes: int) -> None:
        self.ledger.add(name, num_bytes, num_bytes)


@dataclass
class Visit:
    """One call: where its rows are, how many ids each rank has (N,), how many are of this rank's
    experts for its own tokens."""

    owner: InMemoryDispatcher
    windows: Windows
    used_N: Tensor
    stay: int

    @property
    def tokens(self) -> int:
        return int(self.used_N[self.owner.rank]) // self.windows.active

    @property
    def home_TAD(self) -> Tensor:
        return self.windows.rows_of(self.owner.rank, self.tokens)

    def count(self, rows_here: int) -> None:
        """Into the ledger, as if rows had been sent: those of this rank's tokens, and those that
        its experts return."""
        row_bytes = 2 * self.windows.dim
        for rows in (int(self.used_N[self.owner.rank]), rows_here):
            self.owner.count("all_to_all", (rows - self.stay) * row_bytes)


class _Visit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, weights_TA: Tensor, w1: Tensor, w2: Tensor, visit: Visit):
        owner, windows = visit.owner, visit.windows
        order, starts = plan_windows(windows.ids_WS, visit.used_N, owner.experts, owner.num_experts)
        keep = any(ctx.needs_input_grad)
        hidden = forward_in_place(
            windows.x_MD, w1, w2, order, starts, to_ND=windows.rows_ND, keep=keep
        )
        owner.tell(visit.tokens)
        visit.count(len(order))
        home_TAD = visit.home_TAD
        kept_TAD = torch.empty_like(home_TAD) if keep else None
        y_TD = combined(home_TAD, weights_TA, kept_TAD=kept_TAD)
        if kept_TAD is not None:
            ctx.save_for_backward(x_TD, weights_TA, w1, w2, kept_TAD, order, starts, hidden)
            ctx.visit, ctx.sinks = visit, sinks_of(w1, w2)
        return y_TD

    @staticmethod
    def backward(ctx, grad_TD: Tensor):  # type: ignore[override]
        x_TD, weights_TA, w1, w2, kept_TAD, order, starts, hidden = ctx.saved_tensors
        visit: Visit = ctx.visit
        owner, windows, home_TAD = visit.owner, visit.windows, visit.home_TAD
        windows.x_of(owner.rank, visit.tokens).copy_(x_TD)
        by_weights_TAD = spread(grad_TD, weights_TA, kept_TAD, to_TAD=home_TAD)
        pending = owner.start_telling(visit.tokens)
        by_weights = by_weights_TAD.sum(-1, dtype=weights_TA.dtype)
        by_experts = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        rooms = rooms_of(ctx.sinks) if by_experts else None
        into = (torch.empty_like(w1), torch.empty_like(w2)) if by_experts else None
        if rooms is not None:
            into = rooms.into
        pending.wait()
        backward_in_place(
            windows.x_MD, w1, w2, order, starts, hidden,
            rows_ND=windows.rows_ND, into=into, adds=rooms is not None and rooms.adds,
        )  # fmt: skip
        owner.tell(visit.tokens)
        visit.count(len(order))
        by_w = (put(w1), put(w2)) if rooms is not None else into or (None, None)
        return added(home_TAD), by_weights, *by_w, None
