"""A parameter's masters, moments or frozen weights on this rank, as StateRows over its pages: to be
saved, loaded and filled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ptm.engine.layout import ALIGN, Group, Slot
from ptm.engine.state import stored_shape
from ptm.engine.states import PagedStates, Room
from ptm.engine.stream import CHUNK, HOST


class PageRows:
    """StateRows over pages: one parameter's masters or moments on this rank, or some rows."""

    dtype = torch.float32

    def __init__(self, states: PagedStates, group: Group, slot: Slot, what: str) -> None:
        self._states, self._what, self._row_numel = states, what, slot.row_numel
        start, stop = group.owned(slot)
        self._start, self._stop = group.flat(start), group.flat(stop)
        self.shape = stored_shape(slot.whole_shape)
        if group.held is not None:
            self._row_numel = group.held.row_numel(slot.row_numel)
            self.shape = (self.shape[0], self._row_numel)
        self.first_row = slot.first_row + (start - slot.start) // slot.row_numel

    @property
    def num_rows(self) -> int:
        return (self._stop - self._start) // self._row_numel

    def within(self, first: int, last: int) -> PageRows:
        """Those of rows [first, last) of the whole tensor that are here."""
        found = copy.copy(self)
        end = self.first_row + self.num_rows
        found.first_row = min(max(first, self.first_row), end)
        last = max(found.first_row, min(last, end))
        found._start = self._start + (found.first_row - self.first_row) * self._row_numel
        found._stop = self._start + (last - self.first_row) * self._row_numel
        return found

    def _frozen(self, write: bool) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, weights in their own format) of rows without states."""
        states = self._states
        with states.weights(write=write) as weights:
            for start, stop in states.ranges(self._start, self._stop, states.pages.weights):
                at, count = weights.move(start), stop - start
                yield start, stop, weights.field(states.precision, 0, at, count)

    def _rooms(self) -> Callable[[int], Room]:
        states = self._states
        made = functools.cache(lambda device: Room.of(2 * CHUNK, device))
        return lambda at: made(states.streams.device if states.on_device(at) else HOST.device)

    def read(self) -> Tensor:
        out = torch.empty(self._stop - self._start)
        states, room_at = self._states, self._rooms()
        if self._what == "frozen":
            for start, stop, weight in self._frozen(write=False):
                out[start - self._start : stop - self._start].copy_(weight)
            return out.view(self.num_rows, *self.shape[1:])
        kinds = (states.pages.weights, states.pages.states)
        with states.weights() as weights, states.states() as opt:
            for start, stop in states.ranges(self._start, self._stop, *kinds):
                part = out[start - self._start : stop - self._start]
                if self._what == "master":
                    room = part if not states.on_device(start) else room_at(start).master
                    found = states.master(weights, opt, start, stop - start, room)
                else:
                    head = start % ALIGN  # int8 blocks are read from their start
                    room = room_at(start).moments
                    both = states.moments(opt, start - head, stop - start + head, room)
                    found = getattr(both, self._what)[head:]
                if found.data_ptr() != part.data_ptr():
                    part.copy_(found)
        return out.view(self.num_rows, *self.shape[1:])

    def write(self, rows: Tensor) -> None:
        values = rows.reshape(-1)
        assert values.numel() == self._stop - self._start, (rows.shape, self.shape, self.num_rows)
        states, room_at = self._states, self._rooms()
        if self._what == "frozen":
            for start, stop, weight in self._frozen(write=True):
                weight.copy_(values[start - self._start : stop - self._start])
            return
        kinds = (states.pages.weights, states.pages.states)
        with states.weights(write=True) as weights, states.states(write=True) as opt:
            for start, stop in states.ranges(self._start, self._stop, *kinds):
                part = values[start - self._start : stop - self._start]
                if self._what == "master":
                    room = room_at(start).master[: stop - start]
                    states.put_master(weights, opt, start, room.copy_(part))
                    continue
                head = start % ALIGN
                tail = -stop % ALIGN if states.is_int8 else 0
                tail = min(tail, states.pages.numel - stop)
                count = stop - start + head + tail
                both = states.moments(opt, start - head, count, room_at(start).moments)
                getattr(both, self._what)[head : head + stop - start].copy_(part)
                states.put_moments(opt, start - head, both)
