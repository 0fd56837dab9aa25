"""Gathering: whole weights of a unit for as long as it computes.

    start    own shard from its pages into the unit's frame; the other ranks' shards on their way
    ready    wait for them, and point the parameters into the frame
    release  point the parameters at nothing; the frame is free

With zero 3, blocks share two frames: one computes while the next arrives. The root (embedding,
norm, head) has its own, and keeps it until the next update. Below zero 3 every unit has a frame of
its own and keeps it. A released parameter is one element seen through strides of zero, so shapes
and types stay right and a use of it is noticed by its values, never by a crash in a library.

Autograd keeps weights for the backward. Where blocks are not recomputed, those weights would keep a
frame alive or, worse, show another unit's values later, so what is saved out of a frame is saved as
its place in the unit and looked up again in the backward, in the frame gathered then.

With an accelerator a gather has a stream of its own: after the computing that used the frame last
and the unit's update, before the computing that uses it next. The host waits for neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptm.engine.layout import Group, Slot, Unit
from ptm.engine.states import PagedStates
from ptm.engine.stream import Event
from ptm.mesh.collectives import Pending, gather
from ptm.mesh.mesh import Mesh


class Place(NamedTuple):
    """A tensor saved out of a unit's frame: how to see it in the frame of the backward."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class Gathered:
    """A unit at run time: its parameters, and where its weights are, if anywhere."""

    unit: Unit
    params: list[tuple[Group, Slot, nn.Parameter]]
    owns_frame: bool
    frame: Tensor | None = None
    pending: list[Pending] | None = None
    arrived: Event | None = None
    "This rank's part of the weights is in the frame."
    is_ready: bool = False
    offsets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        start = 0
        for group in self.unit.groups:
            self.offsets.append(start)
            start += group.numel

    @property
    def trained(self) -> list[tuple[Group, Slot, nn.Parameter]]:
        """Those that have gradients."""
        return [one for one in self.params if not one[0].is_frozen]

    def part(self, group: Group, frame: Tensor) -> Tensor:
        start = self.offsets[self.unit.groups.index(group)]
        return frame[start : start + group.numel]

    def pack(self, tensor: Tensor) -> Tensor | Place:
        frame = self.frame
        if (
            frame is None
            or tensor.untyped_storage().data_ptr() != frame.untyped_storage().data_ptr()
        ):
            return tensor
        offset = int(tensor.storage_offset() - frame.storage_offset())
        return Place(tensor.shape, tensor.stride(), offset)

    def unpack(self, saved: Tensor | Place) -> Tensor:
        if not isinstance(saved, Place):
            return saved
        assert self.frame is not None, f"{self.unit.name} is used before it is gathered"
        frame = self.frame
        return frame.as_strided(saved.shape, saved.stride, frame.storage_offset() + saved.offset)


class Weights:
    """Frames of all units. Called by the thread that trains, in the same order on every rank."""

    def __init__(
        self,
        units: Sequence[Gathered],
        states: PagedStates,
        mesh: Mesh,
        *,
        keep: bool,
        before_gather: Callable[[str], None],
    ) -> None:
        """keep: every unit has a frame and keeps it (zero 1 and 2)."""
        self.units, self.states, self.mesh, self.keep = units, states, mesh, keep
        self.before_gather = before_gather
        self.phase = "forward"
        self.dtype = units[0].params[0][2].dtype
        shared = [u.unit.numel for u in units if not u.owns_frame]
        count = min(2, len(shared))
        self._free = [self._frame(max(shared)) for _ in range(count)]
        for unit in units:
            if unit.owns_frame:
                unit.frame = self._frame(unit.unit.numel)

    def _frame(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self.dtype, device=self.mesh.device)

    @torch.no_grad()
    def start(self, unit: Gathered) -> None:
        """Begin to gather, unless that was done."""
        if unit.is_ready or unit.pending is not None:
            return
        streams = self.states.streams
        last_use = streams.current().record_event()
        with streams.on(streams.gather):
            self.before_gather(unit.unit.name)
            self.states.store.note(f"{self.phase} {unit.unit.name}")
            if unit.frame is None:
                unit.frame = self._free.pop()
            streams.gather.wait_event(last_use)
            unit.pending = []
            for group in unit.unit.groups:
                full = unit.part(group, unit.frame)
                mine = full[group.first : group.last]
                self.states.read_group(group, mine)
                axis = self.mesh.dp if group.axis == "dp" else self.mesh.edp
                streams.flush()
                unit.pending.append(gather(full, group.cuts, axis.get_group(), self.mesh.ledger))
            unit.arrived = streams.gather.record_event()

    def ready(self, unit: Gathered) -> None:
        """The unit's parameters hold its weights when this returns."""
        if unit.is_ready:
            return
        self.start(unit)
        assert unit.pending is not None and unit.frame is not None and unit.arrived is not None
        for pending in unit.pending:
            pending.wait()
        self.states.streams.current().wait_event(unit.arrived)
        self.states.settle(self.states.most_reading)
        unit.pending, unit.is_ready = None, True
        for group, slot, param in unit.params:
            param.data = unit.part(group, unit.frame)[slot.start : slot.stop].view(slot.shape)

    def release(self, unit: Gathered) -> None:
        """Give the frame back, unless the unit keeps it."""
        if not unit.owns_frame and unit.is_ready:
            self._forget(unit)
            assert unit.frame is not None
            self._free.append(unit.frame)
            unit.frame = None

    def outdated(self) -> None:
        """The masters have changed, or will: whatever is gathered is to be gathered again."""
        self.states.settle(0)
        for unit in self.units:
            assert unit.pending is None, unit.unit.name
            if unit.is_ready:
                self._forget(unit)
                if not unit.owns_frame:
                    assert unit.frame is not None
                    self._free.append(unit.frame)
                    unit.frame = None

    def _forget(self, unit: Gathered) -> None:
        unit.is_ready = False
        for _, slot, param in unit.params:
            param.data = nothing(slot.shape, self.dtype, self.mesh.device)


def nothing(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of that shape that takes the memory of one element, which is not a number."""
    return torch.full((1,), torch.nan, dtype=dtype, device=device).expand(tuple(shape))


def saved_as_places(unit: Gathered) -> Any:
    """A context in which autograd saves the unit's weights as places."""
    return torch.autograd.graph.saved_tensors_hooks(unit.pack, unit.unpack)
