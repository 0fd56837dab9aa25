"""States of a run as another number of ranks committed them, read into this one's.

    old ranks   [ rows of w1 | rows of w2 ...]  [ ... ]  [ ... ]      page files, two commits each
    new ranks   [ rows of w1 | ... ]  [ ... ]                         this run's pages

Which rows lie in which page of which old rank follows from the model, the old number of ranks and
the old ep, so the page files need no index: a rank computes where its rows were, and reads those
pages, compared with their checksums. Every number arrives with its bits. Page files of all old
ranks must be on a disk that this machine sees.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptm.common.errors import CheckpointError, line
from ptm.engine.commit import PageReader
from ptm.engine.layout import Layout, Named, PageMap, make_layout
from ptm.engine.open_file import folders_of, newest_of_layout
from ptm.engine.page_rows import PageRows
from ptm.engine.state import StateRows
from ptm.engine.states import PagedStates

KEPT_PAGES = 8


class Found(NamedTuple):
    """A committed step of another layout, there on all of its ranks."""

    folder: str
    world: int
    ep: int
    step: int
    meta: dict[str, Any]


def find(ssd_path: str, run_id: str, *, besides: str) -> Found | None:
    """The newest committed step of this run in another layout than the folder `besides`."""
    best: Found | None = None
    for folder, world, ep in folders_of(ssd_path, run_id):
        if folder.name == besides:
            continue
        newest = newest_of_layout(ssd_path, folder.name, world)
        if newest is not None and (best is None or newest[0] > best.step):
            best = Found(folder.name, world, ep, *newest)
    return best


def read_into(
    state: Mapping[str, StateRows],
    found: Found,
    *,
    ssd_path: str,
    units: Sequence[tuple[str, Sequence[Named]]],
    pages: PageMap,
    dtype: torch.dtype,
    kinds: Mapping[str, str],
    fingerprint: Callable[[PageMap, Layout], str],
    describer: Callable[[PageMap, Layout], Callable[[int], str]],
) -> None:
    """Fill `state` from the pages of a found step. kinds: prefix of a name -> what it is. Frozen
    weights are not in `state`.

    Raises CheckpointError for a damaged page, or pages of another model or format.
    """
    for rank in range(found.world):
        layout = make_layout(units, world=found.world, ep=found.ep, rank=rank)
        reader = PageReader(ssd_path, run_id=found.folder, rank=rank, step=found.step)
        page_bytes = reader.identity.page_bytes
        old = PageMap(layout.numel, page_bytes, pages.format, trained=layout.trained)
        if fingerprint(old, layout) != reader.identity.layout:
            rule = "holds pages of another model, precision or engine.moments"
            remedy = "start with the recipe of that run, or name another engine.ssd_path"
            raise CheckpointError(line("engine.ssd_path", reader.path, rule, remedy))
        reader.describe = describer(old, layout)
        states = PagedStates(ReadStore(reader), old, dtype)
        for group, slot in layout.slots():
            for prefix, what in kinds.items() if not group.is_frozen else ():
                mine = state[prefix + slot.name]
                there = PageRows(states, group, slot, what)
                part = there.within(mine.first_row, mine.first_row + mine.num_rows)
                if part.num_rows:
                    assert isinstance(mine, PageRows)
                    last = part.first_row + part.num_rows
                    mine.within(part.first_row, last).write(part.read())


class ReadStore:
    """A store of pages that are only read, a few of them kept."""

    def __init__(self, reader: PageReader) -> None:
        self.reader = reader
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def hold(self, page: int, *, write: bool = False) -> Tensor:
        assert not write, page
        if page not in self._kept:
            if len(self._kept) == KEPT_PAGES:
                self._kept.popitem(last=False)
            self._kept[page] = self.reader.read(page)
        self._kept.move_to_end(page)
        return self._kept[page]

    def release(self, page: int, *, dirty: bool = False) -> None:
        assert not dirty, page

    def discard(self, pages: Any) -> None:
        del pages

    def note(self, what: str) -> None:
        del what

    def commit(self, step: int, meta: dict[str, Any]) -> None:
        raise AssertionError("read only")

    def wait_commit(self) -> None: ...

    def undo(self) -> None:
        raise AssertionError("read only")

    def report(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...
