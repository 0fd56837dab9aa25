"""Pages in device memory: a prefix of each rank's flat space, which never moves.

    flat space   [ root | block 0 | block 1 | block 2 ... ]
    pages        [ device memory ............ | frames of the host <-> page file ]

They are updated where they are. Where there is a disk they take part in its commits: at a commit
all of them that are durable, which an update has changed, are copied to the host a few at a time
and written to the page file, in the thread that updates, before the commit of the others begins.
So a commit costs the bytes of the durable pages in device memory over the link and to the disk, and
the next updates wait for it; `engine.journal_every` says how often that is. `undo` and `restore`
read the same pages back. The page file is the one of a run without an accelerator, page for page,
so a run can go on with another engine.gpu_bytes, or none.

NOT MEASURED: none of this has run on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ptm.common.errors import OutOfPages, line
from ptm.common.units import format_bytes
from ptm.engine.layout import PageMap, Resident
from ptm.engine.store import PageStore
from ptm.engine.stream import Streams
from ptm.engine.tier import Frames

STAGED_PAGES = 8
"""Pages on their way between the device and the disk at once."""


def num_staged(resident: Resident) -> int:
    return min(STAGED_PAGES, resident.weights + resident.states)


class TieredStore:
    """A Store: pages of the prefix in device memory, all others in `host`, which it owns."""

    def __init__(
        self, host: PageStore, pages: PageMap, resident: Resident, streams: Streams
    ) -> None:
        self.host, self.streams, self.durable = host, streams, pages.durable
        kinds = (pages.weights, pages.states, pages.grads)
        numbers = [k.first + i for k, count in zip(kinds, resident) for i in range(count)]
        num_bytes = len(numbers) * pages.page_bytes
        try:
            arena = torch.zeros(num_bytes, dtype=torch.uint8, device=streams.device)
        except torch.OutOfMemoryError as error:
            rule = "cannot be had beside what is on the device"
            shown = line("engine.gpu_bytes", format_bytes(num_bytes), rule, "lower it")
            raise OutOfPages(shown) from error
        self._pages = dict(zip(numbers, arena.split(pages.page_bytes)))
        self._changed: set[int] = set()
        "Durable pages that are not as the page file has them."
        count = num_staged(resident) if host.has_disk else 0
        self._staged = Frames(count, pages.page_bytes, pin=streams.device.type == "cuda")

    def hold(self, page: int, *, write: bool = False) -> Tensor:
        found = self._pages.get(page)
        return self.host.hold(page, write=write) if found is None else found

    def release(self, page: int, *, dirty: bool = False) -> None:
        if page not in self._pages:
            self.host.release(page, dirty=dirty)
        elif dirty and page in self.durable:
            self._changed.add(page)

    def discard(self, pages: Iterable[int]) -> None:
        """As the host's; pages in device memory cost nothing to keep, and keep what they hold."""
        self.host.discard([page for page in pages if page not in self._pages])

    def note(self, what: str) -> None:
        self.host.note(what)

    def commit(self, step: int, meta: dict[str, Any]) -> None:
        """As PageStore.commit; returns when pages in device memory are written. What the update
        stream does later does not go in. Raises StorageError."""
        self.host.wait_commit()
        with self.streams.on(self.streams.update):
            for batch in self._batches(sorted(self._changed)):
                self._copy(batch, to_host=True)
                self._move(self.host.put, batch)
        self._changed.clear()
        self.host.commit(step, meta)

    def wait_commit(self) -> None:
        self.host.wait_commit()

    def undo(self) -> None:
        """As PageStore.undo; what was changed on the device is read back."""
        self.host.undo()
        self._read(sorted(self._changed))

    def restore(self, step: int) -> None:
        self.host.restore(step)
        self._read([page for page in self._pages if page in self.durable])

    def report(self) -> dict[str, float]:
        return self.host.report() | {"on_device": float(len(self._pages))}

    def close(self) -> None:
        self._pages.clear()
        self.host.close()
        self._staged.close()

    def _read(self, pages: Sequence[int]) -> None:
        for batch in self._batches(pages):
            self._move(self.host.get, batch)
            self._copy(batch, to_host=False)
        self._changed.clear()

    def _batches(self, pages: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Pages, each with its place on the host."""
        for start in range(0, len(pages), STAGED_PAGES):
            yield list(zip(pages[start : start + STAGED_PAGES], range(STAGED_PAGES)))

    def _copy(self, batch: list[tuple[int, int]], *, to_host: bool) -> None:
        for page, place in batch:
            both = (self._staged.tensors[place], self._pages[page])
            self.streams.copy(*(both if to_host else both[::-1]))
        self.streams.current().record_event().synchronize()

    def _move(self, move: Callable[[int, memoryview], None], batch: list[tuple[int, int]]) -> None:
        self.host.at_once(move, [(page, self._staged.views[place]) for page, place in batch])
