"""Where every element of the states lies: units, groups, cuts, and the pages of one rank.

    unit    one block, or the root (embedding, final norm, head): gathered and released together
    group   parameters of a unit that are cut over the same ranks: dense ones over all, experts
            (each rank holds E / ep of them) over the ranks that hold the same experts

    group, flat   [ w1 of local experts | w2 | ... matrices | ... norms and biases ]
    cut           |----- rank 0 -----|----- rank 1 -----|----- rank 2 -----|     at rows

A cut falls on a row of a parameter (ptm/engine/state.py says what a row is), so a rank's part of
any tensor is some whole rows: one collective moves a group, nothing is padded, and shards differ by
less than one row. A rank's shards one after another are its *flat space*, elements 0..n, which
`PageMap` lays out in pages of a fixed size, any number of tensors to a page:

    kind      bytes an element (bf16 | fp32 precision)   page k holds
    weights   2 | 4                                      elements [k x per_page, ...)
    states    10 | 8, or about 4 with int8 moments       the same, one field after another
    grads     4                                          scratch, of no value between steps

Matrices that never change may be held as codes (`Held`): their rows are bytes, which take as many
elements of the flat space as bytes of weights, and become weights when a unit is gathered.

AngelPTM puts at most two tensors in a page, which wastes 23 % of this model's memory on 64 ranks;
packed pages waste the last page of each kind. Nothing here holds memory: all of it is arithmetic,
so the planner uses it for ranks that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from ptm.engine.state import row_numel, stored_shape

ALIGN = 128
"""Elements to which shards start in the flat space: int8 moments share a scale over as many."""


class Held(Protocol):
    """How rows of frozen matrices are held as codes."""

    def row_numel(self, num_inputs: int, /) -> int:
        """Elements of the flat space that a row of so many weights takes."""
        ...

    def decode(self, rows: Tensor, num_inputs: int, /) -> Tensor:
        """(R, num_inputs) fp32 weights of (R, bytes) uint8."""
        ...


class Named(NamedTuple):
    """A parameter before it is placed; shape is the whole tensor's."""

    name: str
    shape: tuple[int, ...]
    is_expert: bool
    is_frozen: bool = False
    "Has no gradient: only its weight is kept, in the format of forward and backward."
    held: Held | None = None
    "Or as codes; frozen matrices only."

    @classmethod
    def of(cls, name: str, parameter: nn.Parameter, held: Held | None) -> Named:
        """held: how frozen experts are, where not as weights."""
        is_expert, is_frozen = ".experts." in name, not parameter.requires_grad
        has_codes = is_expert and is_frozen
        return cls(name, tuple(parameter.shape), is_expert, is_frozen, held if has_codes else None)


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter in its group: elements [start, stop) of the flat group, rows from `first_row`."""

    name: str
    shape: tuple[int, ...]
    whole_shape: tuple[int, ...]
    start: int
    stop: int
    first_row: int
    decays: bool

    @property
    def row_numel(self) -> int:
        return row_numel(self.shape)


@dataclass(frozen=True, slots=True)
class Group:
    """`cuts` are N + 1 positions in the flat group; rank `index` of the axis owns one range."""

    axis: str
    slots: tuple[Slot, ...]
    cuts: tuple[int, ...]
    index: int
    base: int
    "Where this rank's shard starts in its flat space."
    is_frozen: bool = False
    held: Held | None = None

    @property
    def numel(self) -> int:
        return self.cuts[-1]

    @property
    def first(self) -> int:
        return self.cuts[self.index]

    @property
    def last(self) -> int:
        return self.cuts[self.index + 1]

    @property
    def shard_numel(self) -> int:
        return self.last - self.first

    def owned(self, slot: Slot) -> tuple[int, int]:
        """This rank's part of a slot as a range of the flat group; empty where it has none."""
        start = min(max(slot.start, self.first), slot.stop)
        return start, max(start, min(slot.stop, self.last))

    def flat(self, position: int) -> int:
        """Position in the group -> position in the rank's flat space; where rows are held as codes
        it is that of a row."""
        return self.base + self._held_before(position) - self._held_before(self.first)

    def flat_numel(self, index: int) -> int:
        """Elements that rank `index` of the axis has in its flat space."""
        return self._held_before(self.cuts[index + 1]) - self._held_before(self.cuts[index])

    @property
    def flat_stop(self) -> int:
        """Where this rank's shard ends in its flat space."""
        return self.base + self.flat_numel(self.index)

    def _held_before(self, position: int) -> int:
        if self.held is None:
            return position
        found = 0
        for slot in self.slots:
            K = slot.row_numel
            rows = max(0, min(position, slot.stop) - slot.start) // K
            found += rows * self.held.row_numel(K)
        return found


@dataclass(frozen=True, slots=True)
class Unit:
    name: str
    groups: tuple[Group, ...]

    @property
    def numel(self) -> int:
        return sum(group.numel for group in self.groups)

    @property
    def trained(self) -> tuple[Group, ...]:
        """The groups that have gradients; they come first."""
        return tuple(group for group in self.groups if not group.is_frozen)

    @property
    def trained_numel(self) -> int:
        return sum(group.numel for group in self.trained)


@dataclass(frozen=True, slots=True)
class Layout:
    """All units of one rank, in the order of the forward, the root first."""

    units: tuple[Unit, ...]
    numel: int
    "Length of the rank's flat space."
    trained: int
    "Length of its first part, what is not frozen."

    def slots(self) -> Iterator[tuple[Group, Slot]]:
        for unit in self.units:
            for group in unit.groups:
                for slot in group.slots:
                    yield group, slot


def make_layout(
    units: Iterable[tuple[str, Sequence[Named]]], *, world: int, ep: int, rank: int
) -> Layout:
    """Place the parameters of each unit. ep divides world and every expert tensor's first dim."""
    named, base, trained = list(units), 0, 0
    groups: dict[str, list[Group]] = {name: [] for name, _ in named}
    for is_frozen in (False, True):  # what is frozen lies behind all that is not
        for name, members in named:
            chosen = [m for m in members if m.is_frozen == is_frozen]
            kinds: dict[tuple[str, Held | None], list[Named]] = {}
            for m in sorted(chosen, key=lambda m: (ep > 1 and m.is_expert, m.held is not None)):
                axis = "edp" if ep > 1 and m.is_expert else "dp"
                kinds.setdefault((axis, m.held), []).append(m)
            for (axis, held), some in kinds.items():
                parts, index = (world, rank) if axis == "dp" else (world // ep, rank // ep)
                share = (ep, rank % ep) if axis == "edp" else (1, 0)
                group = _group(axis, some, parts=parts, index=index, share=share, base=base)
                group = replace(group, is_frozen=is_frozen, held=held)
                groups[name].append(group)
                base += -(-group.flat_numel(index) // ALIGN) * ALIGN
        trained = trained if is_frozen else base
    return Layout(tuple(Unit(name, tuple(found)) for name, found in groups.items()), base, trained)


def _group(
    axis: str,
    members: Sequence[Named],
    *,
    parts: int,
    index: int,
    share: tuple[int, int],
    base: int,
) -> Group:
    slots, start = [], 0
    # Norms and biases get no weight decay (Megatron's rule) and come last.
    for member in sorted(members, key=lambda m: len(m.shape) == 1):
        of, which = share
        assert member.shape[0] % of == 0, (member, share)
        shape = (member.shape[0] // of, *member.shape[1:])
        stop = start + math.prod(shape)
        first_row = which * stored_shape(shape)[0]
        slots.append(
            Slot(member.name, shape, member.shape, start, stop, first_row, len(member.shape) > 1)
        )
        start = stop
    cuts = [_row_at(slots, start * i // parts) for i in range(parts)] + [start]
    return Group(axis, tuple(slots), tuple(cuts), index, base)


def _row_at(slots: Sequence[Slot], position: int) -> int:
    """The start of the row that `position` lies in."""
    slot = next(s for s in slots if position < s.stop)
    return position - (position - slot.start) % slot.row_numel


class Field(NamedTuple):
    """One array within a page of states: bytes [offset, offset + size) of the page."""

    offset: int
    size: int


class Kind(NamedTuple):
    """Pages first, first + 1, ...; page first + k holds elements [k x per_page, ...)."""

    name: str
    first: int
    num_pages: int
    per_page: int

    @property
    def stop(self) -> int:
        """The first page of the next kind."""
        return self.first + self.num_pages

    def pages(self, start: int, stop: int) -> range:
        """Pages that hold elements [start, stop)."""
        if stop <= start:
            return range(0)
        return range(
            self.first + start // self.per_page, self.first + (stop - 1) // self.per_page + 1
        )


class Resident(NamedTuple):
    """How many pages of each kind, from the first on, are in device memory for the whole run."""

    weights: int = 0
    states: int = 0
    grads: int = 0


class Piece(NamedTuple):
    """Elements [start, stop) of the flat space, which lie in one page, from `offset` in it."""

    page: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Bytes of an element, by kind."""

    weight_bytes: int
    is_split: bool
    "Whether weights are the upper half of the masters and the states hold the lower half."
    is_int8: bool

    @property
    def state_block_bytes(self) -> int:
        """Bytes of the states of ALIGN elements."""
        moments = 2 * ALIGN + 2 * 4 if self.is_int8 else 8 * ALIGN
        return moments + (2 * ALIGN if self.is_split else 0)


class PageMap:
    """Pages of a flat space of `numel` elements: weights, then states, then gradients. A commit
    keeps the `durable` ones, of which the `frozen` ones never change once they are filled."""

    def __init__(
        self, numel: int, page_bytes: int, fmt: Format, trained: int | None = None
    ) -> None:
        """trained: elements, from the first on, that have states and gradients; None is all."""
        self.numel, self.page_bytes, self.format = numel, page_bytes, fmt
        self.trained = numel if trained is None else trained
        per_states = page_bytes // fmt.state_block_bytes * ALIGN
        self.weights = self._kind("weights", 0, page_bytes // fmt.weight_bytes)
        self.states = self._kind("states", self.weights.num_pages, per_states)
        durable = self.weights.num_pages + self.states.num_pages
        self.grads = self._kind("grads", durable, page_bytes // 4)
        self.durable = range(durable)
        mixed = -(-self.trained // self.weights.per_page)
        self.frozen = range(mixed, self.weights.stop) if mixed < self.weights.stop else range(0)
        self.num_pages = durable + self.grads.num_pages

    def _kind(self, name: str, first: int, per_page: int) -> Kind:
        numel = self.numel if name == "weights" else self.trained
        return Kind(name, first, -(-numel // per_page), per_page)

    @property
    def used_bytes(self) -> int:
        """Bytes of the states themselves, without what the last page of a kind wastes."""
        blocks = -(-self.trained // ALIGN)
        states = self.trained * 4 + blocks * self.format.state_block_bytes
        return self.numel * self.format.weight_bytes + states

    @property
    def waste(self) -> float:
        return self.num_pages * self.page_bytes / self.used_bytes - 1 if self.numel else 0.0

    def pieces(self, kind: Kind, start: int, stop: int) -> Iterator[Piece]:
        """[start, stop) cut at the pages of one kind."""
        while start < stop:
            number, offset = divmod(start, kind.per_page)
            end = min(stop, (number + 1) * kind.per_page)
            yield Piece(kind.first + number, start, end, offset)
            start = end

    def resident(self, most: int) -> Resident:
        """The pages that lie whole in a prefix of the flat space: the longest prefix in which they
        are `most` or fewer."""

        def within(stop: int) -> Resident:
            kinds = (self.weights, self.states, self.grads)
            is_all = stop >= self.numel
            found = (min(k.num_pages, stop // k.per_page) for k in kinds)
            return Resident(*(k.num_pages for k in kinds)) if is_all else Resident(*found)

        low, high = 0, self.numel
        while low < high:
            middle = (low + high + 1) // 2
            if sum(within(middle)) <= most:
                low = middle
            else:
                high = middle - 1
        return within(low)

    def describe(self, page: int) -> str:
        """`weights 12`: which page of which kind."""
        for kind in (self.weights, self.states, self.grads):
            if page < kind.stop:
                return f"{kind.name} {page - kind.first}"
        raise IndexError(page)
