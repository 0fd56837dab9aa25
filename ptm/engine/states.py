"""Weights, masters, moments and gradients of one rank, as numbers in pages.

The store (ptm/engine/store.py) moves pages and knows no numbers; this file knows what lies where in
a page and moves nothing. A page of states holds its fields one after another, each for all of the
page's elements:

    fp32 moments   exp_avg fp32 | exp_avg_sq fp32 | rest int16
    int8 moments   exp_avg int8 | root of exp_avg_sq uint8 | rest int16 | two fp32 scales a block

`rest` is there in bf16 precision only (ptm/engine/split.py). int8 moments are linear in blocks of
128, after a square root for the second, whose codes are rounded up: a second moment that became
zero would make an endless step.

Pages of a prefix of the flat space may be in device memory for good. A chunk is worked on where its
page of states is; at the end of the prefix, where its weights or gradients can be in the other
memory, those of that chunk are moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ptm.engine.layout import ALIGN, Group, Kind, PageMap, Resident
from ptm.engine.split import join, split
from ptm.engine.stream import CHUNK, HOST, Event, Streams
from ptm.kernels.adamw import Stored


class Store(Protocol):
    """Pages that may be anywhere; a held one is in memory and stays there."""

    def hold(self, page: int, *, write: bool = False) -> Tensor: ...

    def release(self, page: int, *, dirty: bool = False) -> None: ...

    def discard(self, pages: Iterable[int]) -> None: ...

    def note(self, what: str) -> None: ...

    def commit(self, step: int, meta: dict[str, Any]) -> None: ...

    def wait_commit(self) -> None: ...

    def undo(self) -> None: ...

    def report(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class Moments(NamedTuple):
    """A chunk's moments in fp32, views of a page or copies."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass
class Room:
    """fp32 copies of one chunk, made once."""

    master: Tensor
    grad: Tensor
    moments: Moments

    @classmethod
    def of(cls, numel: int, device: torch.device) -> Room:
        a, b, c, d = (torch.empty(numel, device=device) for _ in range(4))
        return cls(a, b, Moments(c, d))


class Cursor:
    """The held page of one kind under a walk over the flat space; use in a `with`."""

    def __init__(self, store: Store, kind: Kind, num_resident: int, *, write: bool) -> None:
        self.store, self.kind, self.write = store, kind, write
        self.num_resident = num_resident
        self.on_device = False
        "Where the held page is."
        self.page = -1
        self.bytes: Tensor = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self.page >= 0:
            self.store.release(self.page, dirty=self.write)
        self.page = -1

    def move(self, start: int) -> int:
        """Hold the page of element `start`; returns the element's place in it."""
        number, offset = divmod(start, self.kind.per_page)
        if self.kind.first + number != self.page:
            self._let_go()
            self.bytes = self.store.hold(self.kind.first + number, write=self.write)
            self.page = self.kind.first + number
            self.on_device = number < self.num_resident
        return offset

    def field(self, dtype: torch.dtype, base: int, offset: int, count: int) -> Tensor:
        """Elements [offset, offset + count) of the array of `dtype` at byte `base`."""
        start = base + offset * dtype.itemsize
        return self.bytes[start : start + count * dtype.itemsize].view(dtype)


class PagedStates:
    """Reads and writes ranges of the flat space. Ranges of one unit are touched by one thread."""

    def __init__(
        self,
        store: Store,
        pages: PageMap,
        precision: torch.dtype,
        *,
        streams: Streams = HOST,
        resident: Resident = Resident(),  # noqa: B008
        most_reading: int = 1,
    ) -> None:
        """resident: pages in device memory. most_reading: pages of the host that copies to the
        device may hold at once."""
        self.store, self.pages, self.precision = store, pages, precision
        self.streams, self.resident, self.most_reading = streams, resident, most_reading
        self._reading: deque[tuple[int, Event]] = deque()
        self.is_split, self.is_int8 = pages.format.is_split, pages.format.is_int8
        count = pages.states.per_page
        moment = 1 if self.is_int8 else 4
        self.at_sq = count * moment
        self.at_rest = 2 * count * moment
        self.at_scales = self.at_rest + (2 * count if self.is_split else 0)

    def weights(self, *, write: bool = False) -> Cursor:
        return Cursor(self.store, self.pages.weights, self.resident.weights, write=write)

    def states(self, *, write: bool = False) -> Cursor:
        return Cursor(self.store, self.pages.states, self.resident.states, write=write)

    def grads(self, *, write: bool = False) -> Cursor:
        return Cursor(self.store, self.pages.grads, self.resident.grads, write=write)

    def on_device(self, start: int) -> bool:
        """Whether the states of element `start` are in device memory."""
        return start // self.pages.states.per_page < self.resident.states

    def is_resident(self, start: int, stop: int) -> bool:
        """Whether all pages of elements [start, stop) are in device memory."""
        kinds = (self.pages.weights, self.pages.states, self.pages.grads)
        return all((stop - 1) // k.per_page < n for k, n in zip(kinds, self.resident))

    def ranges(
        self, start: int, stop: int, *kinds: Kind, wide: bool = False
    ) -> Iterator[tuple[int, int]]:
        """[start, stop) cut at the pages of `kinds` and into chunks; `wide`: into those of the
        device, where all pages are there."""
        while start < stop:
            ends = [(start // kind.per_page + 1) * kind.per_page for kind in kinds]
            chunk = self.streams.chunk if wide and self.is_resident(start, min(ends)) else CHUNK
            end = min(stop, start + chunk, *ends)
            yield start, end
            start = end

    def read_weights(self, start: int, stop: int, out: Tensor) -> None:
        """Copy weights [start, stop) into `out`, in the format of forward and backward, on the
        current stream. The copies may go on after the return: pages stay held until `settle`."""
        kind, size, streams = self.pages.weights, self.precision.itemsize, self.streams
        for page, at, end, offset in self.pages.pieces(kind, start, stop):
            data = self.store.hold(page)[offset * size : (offset + end - at) * size]
            streams.copy(out[at - start : end - start], data.view(self.precision))
            self._reading.append((page, streams.current().record_event()))
            self.settle(self.most_reading)

    def read_group(self, group: Group, out: Tensor) -> None:
        """Copy this rank's shard of a group into `out`, as `read_weights` does; rows that are held
        as codes become weights there."""
        if group.held is None:
            self.read_weights(group.base, group.flat_stop, out)
            return
        for slot in group.slots:
            (first, last), K = group.owned(slot), slot.row_numel
            step = max(1, CHUNK // K) * K
            for start in range(first, last, step):
                stop = min(start + step, last)
                at, end = group.flat(start), group.flat(stop)
                rows = torch.empty(end - at, dtype=self.precision, device=out.device)
                self.read_weights(at, end, rows)
                self.streams.flush()
                codes = rows.view(torch.uint8).view((stop - start) // K, -1)
                near = group.held.decode(codes, K)
                out[start - group.first : stop - group.first].copy_(near.view(-1))

    def settle(self, most: int) -> None:
        """Release pages that copies are done with, and wait until at most `most` are not. Called
        by the threads that gather, of which one runs at a time."""
        while self._reading:
            page, event = self._reading[0]
            if len(self._reading) > most:
                event.synchronize()
            elif not event.query():
                break
            self._reading.popleft()
            self.store.release(page)

    def _field(
        self, cursor: Cursor, dtype: torch.dtype, base: int, at: int, count: int, on_device: bool
    ) -> Tensor:
        """A chunk's array in the memory that is wanted: a view of the page, or at the end of the
        prefix a copy."""
        found = cursor.field(dtype, base, cursor.move(at), count)
        is_there = cursor.on_device == on_device
        return found if is_there else self.streams.moved(found, to_device=on_device)

    def gradient(self, grads: Cursor, at: int, count: int) -> Tensor:
        """fp32 sums of a chunk, where its states are."""
        return self._field(grads, torch.float32, 0, at, count, self.on_device(at))

    def master(self, weights: Cursor, states: Cursor, at: int, count: int, room: Tensor) -> Tensor:
        """fp32 masters of a chunk, where its states are: a view of the page, or made in `room`
        when split."""
        weight = self._field(weights, self.precision, 0, at, count, self.on_device(at))
        if not self.is_split:
            return weight
        rest = states.field(torch.int16, self.at_rest, states.move(at), count)
        return join(weight, rest, room[:count])

    def put_master(self, weights: Cursor, states: Cursor, at: int, master: Tensor) -> None:
        """Store masters of a chunk; uses up `master` when split."""
        count = master.numel()
        weight = weights.field(self.precision, 0, weights.move(at), count)
        if not self.is_split:
            if weight.data_ptr() != master.data_ptr():
                weight.copy_(master)
            return
        is_there = weights.on_device == self.on_device(at)
        near = weight if is_there else torch.empty_like(weight, device=master.device)
        split(master, near, states.field(torch.int16, self.at_rest, states.move(at), count))
        if not is_there:
            weight.copy_(near)

    def stored(self, weights: Cursor, states: Cursor, at: int, count: int) -> Stored | None:
        """A chunk as it is in its pages; None where its weights and states are in two memories."""
        weight = weights.field(self.precision, 0, weights.move(at), count)
        offset = states.move(at)
        if weights.on_device != states.on_device:
            return None
        rest = states.field(torch.int16, self.at_rest, offset, count) if self.is_split else None
        if not self.is_int8:
            avg, sq = (states.field(torch.float32, b, offset, count) for b in (0, self.at_sq))
            return Stored(weight, rest, avg, sq)
        (avg, by_avg), (sq, by_sq) = (self._codes(states, i, offset, count) for i in (0, 1))
        return Stored(weight, rest, avg, sq, (by_avg, by_sq))

    def moments(self, states: Cursor, at: int, count: int, room: Moments) -> Moments:
        """fp32 moments of a chunk: views of the page, or made in `room` from int8."""
        offset = states.move(at)
        if not self.is_int8:
            return Moments(
                states.field(torch.float32, 0, offset, count),
                states.field(torch.float32, self.at_sq, offset, count),
            )
        found = Moments(room.exp_avg[:count], room.exp_avg_sq[:count])
        for which, out in enumerate(found):
            codes, scales = self._codes(states, which, offset, count)
            _blocks(out.copy_(codes), lambda x, s: x.mul_(s), scales)
        found.exp_avg_sq.square_()
        return found

    def put_moments(self, states: Cursor, at: int, moments: Moments) -> None:
        """Store a chunk's moments; uses up `moments` when int8. `at` is a multiple of 128."""
        if not self.is_int8:
            return  # they were views
        offset, count = states.move(at), moments.exp_avg.numel()
        moments.exp_avg_sq.sqrt_()
        for which, values in enumerate(moments):
            codes, scales = self._codes(states, which, offset, count)
            most = 127.0 if which == 0 else 255.0
            whole = count // ALIGN * ALIGN
            body = values[:whole].view(-1, ALIGN)
            torch.amax(body.abs(), 1, out=scales[: whole // ALIGN])
            if whole < count:
                scales[-1] = values[whole:].abs().max()
            scales.div_(most)
            inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
            _blocks(values, lambda x, s: x.mul_(s), inverse)
            codes.copy_(values.round_() if which == 0 else values.sub_(1e-3).ceil_())

    def _codes(self, states: Cursor, which: int, offset: int, count: int) -> tuple[Tensor, Tensor]:
        dtype = torch.int8 if which == 0 else torch.uint8
        blocks = -(-count // ALIGN)
        scales = self.at_scales + which * (self.pages.states.per_page // ALIGN) * 4
        return (
            states.field(dtype, self.at_sq * which, offset, count),
            states.field(torch.float32, scales, offset // ALIGN, blocks),
        )


def _blocks(values: Tensor, apply, scales: Tensor) -> None:
    """apply(values of each block, its scale); the last block may be short."""
    whole = values.numel() // ALIGN * ALIGN
    apply(values[:whole].view(-1, ALIGN), scales[: whole // ALIGN, None])
    if whole < values.numel():
        apply(values[whole:], scales[-1])
