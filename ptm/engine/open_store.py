"""The page store of one rank: sized by the recipe's budgets, on the run's own page file.

    <ssd_path>/<run id>.n4e2/rank-00003.pages, .record-a, .record-b

A page file belongs to a run and a layout (4 ranks, ep 2). When the ranks start again, each knows
the last two steps that it committed; the newest step that all of them have is the one to go on
from. Page files of another layout stay until this one has a commit: they can be read
(ptm/engine/reshard.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptm.engine import reshard
from ptm.engine.budget import Budget, make_budget
from ptm.engine.config import EngineConfig
from ptm.engine.eviction import POLICIES
from ptm.engine.layout import Layout, PageMap
from ptm.engine.paging import Paging
from ptm.engine.record import Identity, RecordLog, refuse_another
from ptm.engine.reshard import Found
from ptm.engine.states import Store
from ptm.engine.store import PageStore
from ptm.engine.tier import SsdTier, probe
from ptm.mesh.mesh import Mesh
from ptm.mesh.peers import Peers

PROBE_S = 1.0
"""Seconds in which the disk shows its rates at the start."""


@dataclass(frozen=True)
class Tiers:
    """What an engine gets to keep its pages in."""

    store: Store
    paging: Paging | None = None
    "None where all pages are in memory."
    restored: tuple[int, dict[str, Any]] | None = None
    "The committed step that the pages hold now, and its meta; None for pages of zeros."
    journal_every: int = 0
    "Steps between two commits; 0 without a disk."
    budget: Budget | None = None
    elsewhere: Found | None = None
    "A newer committed step of this run, in page files of another layout."
    folder: Path | None = None
    "Where this run's page files of all layouts are."


class TierOpener:
    """Made with what is known before the layout; called once with it by the engine.

    Raises PlanError, StorageError, CheckpointError on all ranks alike.
    """

    def __init__(
        self, config: EngineConfig, mesh: Mesh, peers: Peers, *, zero: int, run_id: str
    ) -> None:
        self.config, self.mesh, self.peers = config, mesh, peers
        self.zero, self.run_id = zero, run_id

    def __call__(self, pages: PageMap, layout: Layout, compute_bytes: int) -> Tiers:
        config = self.config
        budget = make_budget(
            config,
            layout,
            pages,
            zero=self.zero,
            compute_bytes=compute_bytes,
            world=self.mesh.world,
        )
        ssd, step = None, None
        if config.ssd_path is not None:
            ssd, step = self._open_file(config.ssd_path, self._identity(pages, layout))
        store = PageStore(
            num_pages=pages.num_pages,
            page_bytes=pages.page_bytes,
            num_frames=budget.num_frames,
            durable=pages.durable,
            ssd=ssd,
            policy=POLICIES[config.policy](),
            pin=self.mesh.device.type == "cuda",
            describe=describer(pages, layout),
            agree=self.mesh.agreement(config.timeout_s) if ssd is not None else None,
        )
        restored = None
        if step is not None:
            restored = next((s, meta) for s, meta in store.records() if s == step)
            store.restore(step)
        paging = None
        if ssd is not None and budget.num_frames < pages.num_pages:
            found = probe(ssd.path.parent, pages.page_bytes, PROBE_S)
            paging = Paging(
                store,
                pages,
                num_frames=budget.num_frames,
                policy=config.policy,
                rates=(found.read_bytes_per_s, found.write_bytes_per_s),
                commits=config.journal_every == 1,
            )
        if ssd is None:
            return Tiers(store, paging, budget=budget)
        elsewhere = self._elsewhere(ssd.identity, -1 if step is None else step)
        return Tiers(
            store, paging, restored, config.journal_every, budget, elsewhere, ssd.path.parent
        )

    def _elsewhere(self, identity: Identity, step: int) -> Found | None:
        """A newer step in page files of another layout; all must be on the disk of rank 0."""
        ssd_path = self.config.ssd_path
        assert ssd_path is not None

        def look() -> list[Any] | None:
            found = None
            if self.mesh.is_main:
                found = reshard.find(ssd_path, self.run_id, besides=identity.run_id)
            return None if found is None or found.step <= step else list(found)

        heard = self.peers.together(look)[0]
        return None if heard is None else Found(*heard)

    def _identity(self, pages: PageMap, layout: Layout) -> Identity:
        return Identity(
            run_id=folder_name(self.run_id, self.mesh.world, self.config.ep),
            world=self.mesh.world,
            rank=self.mesh.rank,
            ep=self.config.ep,
            page_bytes=pages.page_bytes,
            num_pages=pages.num_pages,
            durable_start=0,
            durable_stop=len(pages.durable),
            layout=fingerprint(pages, layout),
        )

    def _open_file(self, ssd_path: str, identity: Identity) -> tuple[SsdTier, int | None]:
        """This rank's page file, and the step to restore from it."""
        steps = self.peers.together(lambda: committed_steps(ssd_path, identity))
        common = set(steps[0]).intersection(*steps[1:])
        opened: list[SsdTier] = []

        def open_one() -> None:
            if common:
                opened.append(SsdTier.open_existing(ssd_path, identity))
            else:
                opened.append(SsdTier.create(ssd_path, identity, replace=True))

        self.peers.together(open_one)
        return opened[0], max(common, default=None)


def forget_other_layouts(folder: Path) -> None:
    """Remove page files of the same run that other layouts left, after a commit to `folder`."""
    run_id = folder.name.rpartition(".n")[0]
    for other in folder.parent.glob(f"{run_id}.n*e*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def folder_name(run_id: str, world: int, ep: int) -> str:
    return f"{run_id}.n{world}e{ep}"


def committed_steps(ssd_path: str, identity: Identity) -> list[int]:
    """Steps that this rank's page file can be restored to. Raises CheckpointError where the file
    is of another model, page size or format."""
    log = RecordLog(ssd_path, run_id=identity.run_id, rank=identity.rank)
    records = log.read()
    for record in records:
        refuse_another(record.identity, identity, identity.file(ssd_path, "pages"))
    return [record.step for record in records]


def fingerprint(pages: PageMap, layout: Layout) -> str:
    """Equal for equal contents of every page, whatever made them."""
    what = [
        [slot.name, slot.whole_shape, group.cuts, group.base, slot.start]
        for group, slot in layout.slots()
    ]
    fmt = pages.format
    text = json.dumps([what, fmt.weight_bytes, fmt.is_split, fmt.is_int8])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def describer(pages: PageMap, layout: Layout) -> Callable[[int], str]:
    """Page -> what lies in it, for people: its kind and the tensors it holds parts of."""

    def describe(page: int) -> str:
        kind = next(
            k for k in (pages.weights, pages.states, pages.grads) if page < k.first + k.count
        )
        start = (page - kind.first) * kind.per_page
        stop = start + kind.per_page
        names = []
        for group, slot in layout.slots():
            first, last = (group.flat(p) for p in group.owned(slot))
            if first < stop and start < last:
                names.append(slot.name)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{kind.name} of {shown}"

    return describe
