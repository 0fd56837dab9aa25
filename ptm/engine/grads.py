"""Gradients: from the parameters of a unit to sums in the pages of the ranks that own them.

    arrived   autograd has a parameter's gradient: copied into the unit's flat buffer, and freed,
              unless a kernel has put it there itself (ptm/kernels/sink.py)
    finish    all of a unit have: each rank's range is on its way to it
    take      what came is added up in fp32, in rank order, and added to the sums in this rank's
              pages in device memory; what belongs in pages of the host is on its way there
    land      the same for pages of the host; with the last micro-batch of a step the squares of
              all sums are added up too

Gradients travel in the type that autograd made them in: rounding them again would lose, widening
them would only cost bytes. With zero 1 they are summed over micro-batches at home, in fp32, and
travel once a step; that is fewer bytes from three micro-batches on, for 4 bytes a parameter.
Without an accelerator, take and land are one; with one, `take` has a stream of its own, and between
the two another unit's backward runs.

Two buffers: one is filled while the other is on its way. The root fills over the whole backward and
has its own. The number and order of collectives depend on nothing but the order of the units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptm.engine.budget import owned_numel, received_numel
from ptm.engine.layout import Group, Slot
from ptm.engine.states import PagedStates
from ptm.engine.stream import CHUNK, Event
from ptm.engine.timing import Timing
from ptm.engine.weights import Gathered
from ptm.kernels.pieces import add_pieces, add_pieces_norms, sum_pieces
from ptm.mesh.collectives import PendingSum, scatter_sum
from ptm.mesh.mesh import Mesh


@dataclass(eq=False)
class Summing:
    """A unit's gradients at run time."""

    gathered: Gathered
    owns_buffer: bool
    buffer: Tensor | None = None
    missing: set[str] = field(default_factory=set)
    put: set[str] = field(default_factory=set)
    "Parameters whose gradients a kernel has put into the buffer in this micro-batch."
    pending: list[tuple[Group, PendingSum]] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    "Of each piece of this step's sums, fp64, where the sums are."

    @property
    def name(self) -> str:
        return self.gathered.unit.name

    def part(self, group: Group, slot: Slot) -> Tensor:
        assert self.buffer is not None
        return self.gathered.part(group, self.buffer)[slot.start : slot.stop].view(slot.shape)


class UnderWay(NamedTuple):
    """A unit's gradients between `finish` and `land`, with what is to be done then: a later
    micro-batch may have begun."""

    unit: Summing
    room: Tensor | None
    replaces: bool
    "Whether the sums in the pages are of an earlier step."
    is_last: bool


class Part(NamedTuple):
    """Sums of elements [start, start + S) of the flat space on their way to pages of the host."""

    start: int
    pieces_NS: Tensor


@dataclass
class Landing:
    """A unit's gradients between `take` and `land`."""

    done: UnderWay
    parts: list[Part]
    arrived: Event
    room: Tensor | None
    "Page-locked memory that `parts` are views of."


class Grads:
    """Called from backward, by the thread that runs it."""

    def __init__(
        self,
        units: Sequence[Gathered],
        states: PagedStates,
        mesh: Mesh,
        timing: Timing,
        *,
        is_local: bool,
    ) -> None:
        """is_local: sum over micro-batches at home first (zero 1)."""
        self.states, self.mesh, self.timing = states, mesh, timing
        self.is_local = is_local and mesh.world > 1
        self.dtype = torch.float32 if self.is_local else units[0].params[0][2].dtype
        self.is_first = self.is_last = True
        owns = [True, *([self.is_local] * (len(units) - 1))]
        trained = [unit for unit in units if unit.unit.trained]
        found = [Summing(unit, own) for unit, own in zip(units, owns)]
        self.units = [unit for unit in found if unit.gathered.unit.trained]
        shared = [u.gathered.unit.trained_numel for u in self.units if not u.owns_buffer]
        streams = states.streams
        depth = min(2 if mesh.world > 1 or streams.has_device else 1, len(shared))
        self._free = [self._buffer(max(shared, default=0)) for _ in range(depth)]
        for unit in self.units:
            if unit.owns_buffer:
                unit.buffer = self._buffer(unit.gathered.unit.trained_numel)
        self._rooms = [self._room(trained) for _ in range(depth + 1)] if mesh.world > 1 else []
        self._under_way: list[UnderWay] = []
        self._landing: list[Landing] = []
        self._host_rooms: list[Tensor] = []
        if streams.has_device:
            numel = max(owned_numel(unit.unit) for unit in trained)
            dtype = torch.float32 if mesh.world > 1 else self.dtype
            self._host_rooms = [streams.room(numel, dtype) for _ in range(2)]
        for unit in self.units:
            for group, slot, param in unit.gathered.trained:
                param.register_post_accumulate_grad_hook(self._hook(unit, group, slot))
                param.grad_sink = Sink(self, unit, group, slot)  # type: ignore[attr-defined]

    def _buffer(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self.dtype, device=self.mesh.device)

    def _room(self, units: Sequence[Gathered]) -> Tensor:
        return self._buffer(max(sum(received_numel(g) for g in u.unit.trained) for u in units))

    def _hook(self, unit: Summing, group: Group, slot: Slot):
        @torch.no_grad()
        def arrived(param: nn.Parameter) -> None:
            assert param.grad is not None
            self.open(unit)
            part = unit.part(group, slot)
            if slot.name in unit.put:
                if not param.grad.is_sparse:  # of another use of the weight, by an ordinary path
                    part.add_(param.grad)
            elif self.is_local and not self.is_first:
                part.add_(param.grad)
            else:
                part.copy_(param.grad)
            param.grad = None
            unit.missing.discard(slot.name)
            if not unit.missing:
                self.finish(unit)

        return arrived

    def begin(self, *, is_first: bool, is_last: bool) -> None:
        """Before the backward of a micro-batch, the first or last of its step."""
        self.is_first, self.is_last = is_first, is_last
        if is_first:
            for unit in self.units:
                unit.norms = []
        for unit in self.units:
            unit.missing = {slot.name for _, slot, _ in unit.gathered.trained}
            unit.put = set()

    def open(self, unit: Summing) -> None:
        """Make its buffer there to be filled."""
        while unit.pending:  # its buffer is still on its way from the micro-batch before
            self._land_oldest()
        if unit.buffer is None:
            while not self._free:
                self._land_oldest()
            unit.buffer = self._free.pop()

    def end(self) -> None:
        """After the backward of a micro-batch: what got no gradient has a gradient of zero."""
        for unit in reversed(self.units):
            if unit.missing:
                self.open(unit)
                for group, slot, _ in unit.gathered.trained:
                    if slot.name in unit.missing and (self.is_first or not self.is_local):
                        unit.part(group, slot).zero_()
                unit.missing = set()
                self.finish(unit)
        if self.is_last:
            while self._under_way or self._landing:
                self._land_oldest()

    def finish(self, unit: Summing) -> None:
        """Send a unit's gradients to their owners."""
        if self.is_local and not self.is_last:
            return
        assert unit.buffer is not None
        if self.mesh.world > 1 and not self._rooms:
            self._land_oldest()
        room = self._rooms.pop(0) if self._rooms else None
        start = 0
        for group in unit.gathered.unit.trained:
            axis = self.mesh.dp if group.axis == "dp" else self.mesh.edp
            part = None if room is None else room[start : start + received_numel(group)]
            start += received_numel(group)
            full = unit.gathered.part(group, unit.buffer)
            pending = scatter_sum(full, group.cuts, axis.get_group(), self.mesh.ledger, buffer=part)
            unit.pending.append((group, pending))
        self._under_way.append(UnderWay(unit, room, self.is_first or self.is_local, self.is_last))
        if self.states.streams.has_device:
            while len(self._under_way) > (self.mesh.world > 1):
                self._take_oldest()
        elif self.mesh.world == 1:
            self._land_oldest()

    @torch.no_grad()
    def _take_oldest(self) -> None:
        if self.states.streams.has_device and not self._host_rooms:
            self._land_oldest()
        done = self._under_way.pop(0)
        unit, streams = done.unit, self.states.streams
        room = self._host_rooms.pop() if self._host_rooms else None
        filled = streams.current().record_event()
        with streams.on(streams.land):
            streams.land.wait_event(filled)
            if done.replaces and not self.timing.before_landing(unit.name):
                done = done._replace(replaces=False)
            landing = Landing(done, [], filled, room)
            for group, pending in unit.pending:
                pending.wait()
                self._add(landing, group, pending.received_NS)
            landing.arrived = streams.land.record_event()
        self._landing.append(landing)

    @torch.no_grad()
    def _land_oldest(self) -> None:
        if not self._landing:
            self._take_oldest()
        landing = self._landing.pop(0)
        done, unit = landing.done, landing.done.unit
        if landing.parts:
            landing.arrived.synchronize()
        self.states.streams.current().wait_event(landing.arrived)
        for part in landing.parts:
            self._add_on_host(done, part)
        unit.pending = []
        if done.is_last:
            self.timing.landed(unit.name)
        if landing.room is not None:
            self._host_rooms.append(landing.room)
        if done.room is not None:
            self._rooms.append(done.room)
        if not unit.owns_buffer:
            assert unit.buffer is not None
            self._free.append(unit.buffer)
            unit.buffer = None

    def _add(self, landing: Landing, group: Group, pieces_NS: Tensor) -> None:
        """Add the ranks' pieces to the sums in pages of the device; the others' to `parts`."""
        states, streams, done = self.states, self.states.streams, landing.done
        first, last = group.base, group.base + group.shard_numel
        middle = min(max(first, states.resident.grads * states.pages.grads.per_page), last)
        with states.grads(write=True) as grads:
            for start, stop in states.ranges(first, middle, states.pages.grads, wide=True):
                total = grads.field(torch.float32, 0, grads.move(start), stop - start)
                self._put(done, total, pieces_NS[:, start - first : stop - first])
        rest_NS = pieces_NS[:, middle - first :]
        if landing.room is not None and middle < last:
            used = sum(part.pieces_NS.numel() for part in landing.parts)
            room = landing.room[used : used + last - middle]
            streams.copy(room, sum_pieces(rest_NS))  # what moves is one piece
            rest_NS = room[None]
        if middle < last:
            landing.parts.append(Part(middle, rest_NS))

    def _add_on_host(self, done: UnderWay, part: Part) -> None:
        states = self.states
        states.store.note(f"backward {done.unit.name}")
        last = part.start + part.pieces_NS.shape[1]
        with states.grads(write=True) as grads:
            for start, stop in states.ranges(part.start, last, states.pages.grads):
                total = grads.field(torch.float32, 0, grads.move(start), stop - start)
                self._put(done, total, part.pieces_NS[:, start - part.start : stop - part.start])

    def _put(self, done: UnderWay, total_C: Tensor, pieces_NC: Tensor) -> None:
        if done.is_last:  # norms are of the same pieces on a device and on the host
            norms = add_pieces_norms(total_C, pieces_NC, replaces=done.replaces, chunk=CHUNK)
            done.unit.norms.append(norms)
        else:
            add_pieces(total_C, pieces_NC, replaces=done.replaces)

    @property
    def square(self) -> float:
        """Sum of squares of this rank's gradient sums, in an order that does not vary. Waits for
        the device."""
        norms = [norm for unit in self.units for norm in unit.norms]
        devices = {norm.device for norm in norms}
        found = [torch.cat([n for n in norms if n.device == d]).tolist() for d in devices]
        return math.fsum(norm**2 for some in found for norm in some)

    def non_finite(self) -> list[tuple[str, int]]:
        """How many sums of each parameter on this rank are not finite, in order."""
        found = []
        for unit in self.units:
            for group, slot, _ in unit.gathered.trained:
                start, stop = group.owned(slot)
                count = 0
                with self.states.grads() as grads:
                    kind = self.states.pages.grads
                    for a, b in self.states.ranges(group.flat(start), group.flat(stop), kind):
                        total = grads.field(torch.float32, 0, grads.move(a), b - a)
                        count += int((~total.isfinite()).sum())
                found.append((slot.name, count))
        return found


class Sink:
    """A parameter's place in its unit's buffer, for kernels."""

    def __init__(self, grads: Grads, unit: Summing, group: Group, slot: Slot) -> None:
        self.grads, self.unit, self.group, self.slot = grads, unit, group, slot

    def room(self) -> tuple[Tensor, bool] | None:
        grads, unit, name = self.grads, self.unit, self.slot.name
        adds = (grads.is_local and not grads.is_first) or name in unit.put
        if adds and grads.dtype != torch.float32:
            return None  # autograd adds up what several uses make
        grads.open(unit)
        unit.put.add(name)
        return unit.part(self.group, self.slot), adds
