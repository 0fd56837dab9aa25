"""Expert parallelism: each rank of the ep axis holds a range of every layer's experts, and token
rows travel to the ranks of their experts and back.

    home of the tokens                              rank of the experts
    x_TD - permute -> rows_SD -- all-to-all ------> rows_QD
                                                       | experts
    y_TD <- combine - rows_SD <------ all-to-all -- rows_QD

S = T x A rows leave a rank, by global expert and in token order within one; Q arrive, by (source
rank, local expert, token order). An expert takes its rows from among them by (source rank, token
order), and puts what it makes in their places (ptm/kernels/moe_mlp.py). Nothing is padded on the
wire and no token is dropped: what a rank sends is its routed rows for other ranks. The numbers of
rows go ahead in an all-to-all of their own, of 8 bytes an expert. Weights are applied at home, as
LocalDispatcher does.

    AllToAllDispatcher   the drawing as it stands; the backward is the same with the arrows turned
    ChunkedDispatcher    the same in pieces, so that one is computed while others are on their way
    InMemoryDispatcher   no rows travel: ranks of one machine read each other's (in_memory.py)

Pieces are ranges of every rank's local experts, not of the tokens: each expert still has all of its
rows in one product, reads its weights once and writes their gradient once, so the result has the
bits of the unchunked one; pieces of tokens would cost `chunks` times the weight traffic, gradient
sums and alignment. The price is that pieces are only as even as the experts' loads.

NOTE every rank of the axis must make the same calls: the same number of micro-batches in training
and in evaluation, rows or not. A rank without tokens (T = 0) takes part as all others do. A block
that is run again in the backward sends its rows again; its routing is kept (recompute.py), so the
numbers agree.

Source: GShard, arXiv 2006.16668; dropless as in MegaBlocks, arXiv 2211.15841; overlap by pieces as
in Tutel, arXiv 2206.03382, but along experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptm.common.errors import RecipeError, line
from ptm.kernels.moe_mlp import Kept, backward_rows, forward_rows, puts_gradients
from ptm.kernels.permute import combine, permute
from ptm.kernels.sink import put, rooms_of, sinks_of
from ptm.mesh.collectives import Pending, all_to_all
from ptm.mesh.mesh import Mesh
from ptm.mesh.shared import port_of
from ptm.model.dispatch import Dispatcher, LocalDispatcher
from ptm.model.experts import Experts
from ptm.model.router import Routing
from ptm.parallel.in_memory import InMemoryDispatcher


def dispatcher_for(mesh: Mesh, num_experts: int, chunks: int = 1) -> Dispatcher:
    """The dispatcher of this mesh's ep axis; at most one chunk for each local expert, and none
    where the axis shares memory and the kernel serves.

    Raises RecipeError where ep does not divide the experts.
    """
    num_ranks = mesh.ep.size()
    check_experts(num_ranks, num_experts)
    chunks = min(chunks, num_experts // num_ranks)
    if num_ranks == 1:
        return LocalDispatcher()
    if chunks == 1:
        found: Dispatcher = AllToAllDispatcher(mesh, num_experts)
    else:
        found = ChunkedDispatcher(mesh, num_experts, chunks)
    if port_of(mesh.ep.get_group()) is not None:
        return InMemoryDispatcher(mesh, num_experts, otherwise=found)
    return found


def check_experts(ep: int, num_experts: int) -> None:
    """Raise RecipeError unless each of `ep` ranks can have as many experts as any other."""
    if num_experts % ep:
        fits = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        rule = f"must divide model.num_experts={num_experts}"
        raise RecipeError(line("engine.ep", ep, rule, f"give one of {fits}"))


def local_experts(mesh: Mesh, num_experts: int) -> slice:
    """The experts that this rank holds."""
    local = num_experts // mesh.ep.size()
    first = mesh.ep.get_local_rank() * local
    return slice(first, first + local)


class Piece(NamedTuple):
    """What the ranks say to each other about one range of local experts, as plain numbers."""

    experts: slice
    rows: slice
    "Of the S rows at home."
    sent: list[int]
    received: list[int]
    "Rows to and from each rank."


class Trip(NamedTuple):
    """How the rows of one call travel. Shapes: place (T, A) in S; of each piece, ids (Q,) of local
    experts, from the piece's first on, and counts (e,) over all sources."""

    place_TA: Tensor
    pieces: list[Piece]
    ids: list[Tensor]
    counts: list[Tensor]


class Wire:
    """The ep axis, as both dispatchers use it: `plan`, then rows `out` to their experts, and
    `home`."""

    def __init__(self, mesh: Mesh, num_experts: int, chunks: int) -> None:
        self.group, self.ledger = mesh.ep.get_group(), mesh.ledger
        self.num_ranks = mesh.ep.size()
        check_experts(self.num_ranks, num_experts)
        local = num_experts // self.num_ranks
        cuts = [c * local // chunks for c in range(chunks + 1)]
        self.ranges = [slice(start, stop) for start, stop in zip(cuts, cuts[1:])]
        grid = torch.arange(num_experts).view(self.num_ranks, local)
        by_piece = torch.cat([grid[:, span].flatten() for span in self.ranges])
        self.order_E = by_piece.argsort().to(mesh.device)
        "Place of each expert in a rank's rows: by piece, then rank, then local expert."

    def plan(self, routing: Routing) -> Trip:
        """Exchange how many rows go where, and wait for it."""
        device = routing.ids_TA.device
        sent_NE = routing.counts_E.view(self.num_ranks, -1)
        ones = [1] * self.num_ranks
        received_NE, pending = all_to_all(
            sent_NE, ones, ones, self.group, self.ledger, name="all_to_all_counts"
        )
        ids = self.order_E[routing.ids_TA].flatten()
        place = torch.empty_like(ids)
        place[ids.argsort(stable=True)] = torch.arange(ids.numel(), device=device)
        pending.wait()
        sent, received = torch.stack([sent_NE, received_NE]).tolist()  # the one wait for a device
        trip = Trip(place.view_as(routing.ids_TA), [], [], [])
        start = 0
        for span in self.ranges:
            piece = _piece(span, start, sent, received)
            start = piece.rows.stop
            counts_NE = received_NE[:, span]
            counts_e = counts_NE.sum(0)
            ids_E = torch.arange(counts_e.numel(), device=device).repeat(self.num_ranks)
            ids_Q = ids_E.repeat_interleave(counts_NE.flatten(), output_size=sum(piece.received))
            trip.pieces.append(piece)
            trip.ids.append(ids_Q)
            trip.counts.append(counts_e)
        return trip

    def out(self, rows_SD: Tensor, piece: Piece) -> tuple[Tensor, Pending]:
        """Start a piece's rows (S, D) towards their experts; (Q, D) arrive."""
        rows = rows_SD[piece.rows]
        return all_to_all(rows, piece.sent, piece.received, self.group, self.ledger)

    def home(self, rows_QD: Tensor, piece: Piece) -> tuple[Tensor, Pending]:
        """Start rows (Q, D) in the order of their arrival back to where they came from."""
        return all_to_all(rows_QD, piece.received, piece.sent, self.group, self.ledger)


def _piece(span: slice, start: int, sent: list[list[int]], received: list[list[int]]) -> Piece:
    sent_N = [sum(counts[span]) for counts in sent]
    received_N = [sum(counts[span]) for counts in received]
    return Piece(span, slice(start, start + sum(sent_N)), sent_N, received_N)


class AllToAllDispatcher:
    """Experts of other ranks by one all-to-all there and one back. Made by `dispatcher_for`."""

    def __init__(self, mesh: Mesh, num_experts: int) -> None:
        self.wire = Wire(mesh, num_experts, chunks=1)

    def run(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """As LocalDispatcher, with `experts` holding this rank's only. Moves S rows each way, less
        those that stay."""
        trip = self.wire.plan(routing)
        (piece,), (ids_Q,), (counts_e,) = trip.pieces, trip.ids, trip.counts
        rows_SD = permute(x_TD, trip.place_TA, trip.place_TA.numel())
        rows_QD: Any = _Out.apply(rows_SD, piece, self.wire)
        rows_QD = experts(rows_QD, ids_Q[:, None], None, counts_e)
        rows_SD = _Home.apply(rows_QD, piece, self.wire)
        return combine(rows_SD, trip.place_TA, routing.weights_TA)


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_SD: Tensor, piece: Piece, wire: Wire) -> Tensor:
        ctx.piece, ctx.wire = piece, wire
        return _arrived(wire.out(rows_SD, piece))

    @staticmethod
    def backward(ctx, grad_QD: Tensor):  # type: ignore[override]
        return _arrived(ctx.wire.home(grad_QD, ctx.piece)), None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_QD: Tensor, piece: Piece, wire: Wire) -> Tensor:
        ctx.piece, ctx.wire = piece, wire
        return _arrived(wire.home(rows_QD, piece))

    @staticmethod
    def backward(ctx, grad_SD: Tensor):  # type: ignore[override]
        return _arrived(ctx.wire.out(grad_SD, ctx.piece)), None, None


def _arrived(coming: tuple[Tensor, Pending]) -> Tensor:
    rows, pending = coming
    pending.wait()
    return rows


class ChunkedDispatcher:
    """As AllToAllDispatcher, bit for bit, in pieces that overlap. Made by `dispatcher_for`.

        wire      out 0 | out 1 | home 0, out 2 | home 1, out 3 | ...
        experts         |   0   |       1       |       2       | ...

    The backward is the same pipeline with gradients. NOTE the stacked weights are used as they are:
    `experts.forward` is not called.
    """

    def __init__(self, mesh: Mesh, num_experts: int, chunks: int) -> None:
        self.wire = Wire(mesh, num_experts, chunks)

    def run(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """As LocalDispatcher, with `experts` holding this rank's only."""
        trip = self.wire.plan(routing)
        rows_SD = permute(x_TD, trip.place_TA, trip.place_TA.numel())
        rows: Any = _Pipeline.apply(
            rows_SD, experts.w1, experts.w2, self.wire, trip.pieces, trip.ids, trip.counts
        )
        return combine(rows, trip.place_TA, routing.weights_TA)


class _Pipeline(torch.autograd.Function):
    """One function over all pieces, so that a piece's weight gradients are written into its slice
    of the stack; autograd's own slicing would add up one full-size gradient for each piece."""

    @staticmethod
    def forward(
        ctx, rows_SD: Tensor, w1: Tensor, w2: Tensor, wire: Wire, pieces: list[Piece], ids, counts
    ) -> Tensor:
        kept, homes = [], []
        for c, (piece, rows_QD) in enumerate(_arrivals(rows_SD, wire, pieces)):
            mine = piece.experts
            y_QD, keep = forward_rows(rows_QD, ids[c], counts[c], w1[mine], w2[mine])
            homes.append(wire.home(y_QD, piece))
            kept += keep
        ctx.save_for_backward(w1, w2, *kept)
        ctx.wire, ctx.pieces = wire, pieces
        ctx.sinks = sinks_of(w1, w2) if puts_gradients(rows_SD, w1, w2) else None
        return _whole(homes)

    @staticmethod
    def backward(ctx, grad_SD: Tensor):  # type: ignore[override]
        w1, w2, *kept = ctx.saved_tensors
        rooms = rooms_of(ctx.sinks)
        into, adds = rooms or ((torch.empty_like(w1), torch.empty_like(w2)), False)
        homes = []
        for c, (piece, grad_QD) in enumerate(_arrivals(grad_SD, ctx.wire, ctx.pieces)):
            mine, of_piece = piece.experts, Kept(*kept[4 * c : 4 * c + 4])
            part = into[0][mine], into[1][mine]
            grad_x = backward_rows(grad_QD, w1[mine], w2[mine], of_piece, into=part, adds=adds)
            homes.append(ctx.wire.home(grad_x, piece))
        by_w = into if rooms is None else (put(w1), put(w2))
        return _whole(homes), *by_w, None, None, None, None


def _arrivals(rows_SD: Tensor, wire: Wire, pieces: list[Piece]):
    """Yield (piece, rows as they arrived) in turn, each with the next one under way."""
    coming = wire.out(rows_SD, pieces[0])
    for c, piece in enumerate(pieces):
        here = coming
        if c + 1 < len(pieces):
            coming = wire.out(rows_SD, pieces[c + 1])
        yield piece, _arrived(here)


def _whole(homes: list[tuple[Tensor, Pending]]) -> Tensor:
    for _, pending in homes:
        pending.wait()
    return torch.cat([rows for rows, _ in homes])
