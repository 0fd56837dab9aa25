"""Gradients: from the parameters of a unit to sums in the pages of the ranks that own them.

    arrived   autograd has a parameter's gradient: copied into the unit's flat buffer, and freed
    finish    all of a unit have: each rank's range is on its way to it
    land      what came is added, in rank order, in fp32, to the sums in this rank's pages;
              with the last micro-batch of a step the squares of the sums are added up too

Gradients travel in the type that autograd made them in: rounding them again would lose, widening
them would only cost bytes. With zero 1 they are summed over micro-batches at home, in fp32, and
travel once a step; that is fewer bytes from three micro-batches on, for 4 bytes a parameter.

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

from ptm.engine.budget import received_numel
from ptm.engine.layout import Group, Slot
from ptm.engine.states import PagedStates
from ptm.engine.timing import Timing
from ptm.engine.weights import Gathered
from ptm.mesh.collectives import PendingSum, scatter_sum
from ptm.mesh.mesh import Mesh


@dataclass(eq=False)
class Summing:
    """A unit's gradients at run time."""

    gathered: Gathered
    owns_buffer: bool
    buffer: Tensor | None = None
    missing: set[str] = field(default_factory=set)
    pending: list[tuple[Group, PendingSum]] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

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
        self.units = [Summing(unit, own) for unit, own in zip(units, owns)]
        shared = [u.gathered.unit.numel for u in self.units if not u.owns_buffer]
        depth = min(2 if mesh.world > 1 else 1, len(shared))
        self._free = [self._buffer(max(shared)) for _ in range(depth)]
        for unit in self.units:
            if unit.owns_buffer:
                unit.buffer = self._buffer(unit.gathered.unit.numel)
        self._rooms = [self._room(units) for _ in range(depth + 1)] if mesh.world > 1 else []
        self._under_way: list[UnderWay] = []
        for unit in self.units:
            for group, slot, param in unit.gathered.params:
                param.register_post_accumulate_grad_hook(self._hook(unit, group, slot))

    def _buffer(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self.dtype, device=self.mesh.device)

    def _room(self, units: Sequence[Gathered]) -> Tensor:
        return self._buffer(max(sum(received_numel(g) for g in u.unit.groups) for u in units))

    def _hook(self, unit: Summing, group: Group, slot: Slot):
        @torch.no_grad()
        def arrived(param: nn.Parameter) -> None:
            assert param.grad is not None
            self._open(unit)
            part = unit.part(group, slot)
            if self.is_local and not self.is_first:
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
                unit.squares = []
        for unit in self.units:
            unit.missing = {slot.name for _, slot, _ in unit.gathered.params}

    def _open(self, unit: Summing) -> None:
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
                self._open(unit)
                for group, slot, _ in unit.gathered.params:
                    if slot.name in unit.missing and (self.is_first or not self.is_local):
                        unit.part(group, slot).zero_()
                unit.missing = set()
                self.finish(unit)
        if self.is_last:
            while self._under_way:
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
        for group in unit.gathered.unit.groups:
            axis = self.mesh.dp if group.axis == "dp" else self.mesh.edp
            part = None if room is None else room[start : start + received_numel(group)]
            start += received_numel(group)
            full = unit.gathered.part(group, unit.buffer)
            pending = scatter_sum(full, group.cuts, axis.get_group(), self.mesh.ledger, buffer=part)
            unit.pending.append((group, pending))
        self._under_way.append(UnderWay(unit, room, self.is_first or self.is_local, self.is_last))
        if self.mesh.world == 1:
            self._land_oldest()

    @torch.no_grad()
    def _land_oldest(self) -> None:
        done = self._under_way.pop(0)
        unit = done.unit
        if done.replaces and not self.timing.before_landing(unit.name):
            done = done._replace(replaces=False)
        for group, pending in unit.pending:
            pending.wait()
            self._add(done, group, pending.received_NS)
        unit.pending = []
        if done.is_last:
            self.timing.landed(unit.name)
        if done.room is not None:
            self._rooms.append(done.room)
        if not unit.owns_buffer:
            assert unit.buffer is not None
            self._free.append(unit.buffer)
            unit.buffer = None

    def _add(self, done: UnderWay, group: Group, pieces_NS: Tensor) -> None:
        """Add the ranks' pieces to the sums in the pages, one rank after another."""
        first, last = group.base, group.base + group.shard_numel
        self.states.store.note(f"backward {done.unit.name}")
        with self.states.grads(write=True) as grads:
            for start, stop in self.states.ranges(first, last, self.states.pages.grads):
                total = grads.field(torch.float32, 0, grads.move(start), stop - start)
                mine_NC = pieces_NS[:, start - first : stop - first]
                if mine_NC.device != total.device:  # added up where they are, then moved once
                    mine_NC = mine_NC.float().cumsum(0)[-1:].to(total.device)
                if done.replaces:
                    total.copy_(mine_NC[0])
                else:
                    total.add_(mine_NC[0])
                for piece_C in mine_NC[1:]:
                    total.add_(piece_C)
                if done.is_last:
                    norm = torch.linalg.vector_norm(total, dtype=torch.float64)
                    done.unit.squares.append(float(norm) ** 2)

    @property
    def square(self) -> float:
        """Sum of squares of this rank's gradient sums, in an order that does not vary."""
        return math.fsum(s for unit in self.units for s in unit.squares)

    def non_finite(self) -> list[tuple[str, int]]:
        """How many sums of each parameter on this rank are not finite, in order."""
        found = []
        for unit in self.units:
            for group, slot, _ in unit.gathered.params:
                start, stop = group.owned(slot)
                count = 0
                with self.states.grads() as grads:
                    kind = self.states.pages.grads
                    for a, b in self.states.ranges(group.flat(start), group.flat(stop), kind):
                        total = grads.field(torch.float32, 0, grads.move(a), b - a)
                        count += int((~total.isfinite()).sum())
                found.append((slot.name, count))
        return found
