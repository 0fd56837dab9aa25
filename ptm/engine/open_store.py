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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptm.common.errors import CheckpointError, RecipeError, line
from ptm.common.units import parse_bytes
from ptm.engine import reshard
from ptm.engine.budget import Budget, make_budget
from ptm.engine.config import EngineConfig
from ptm.engine.device import TieredStore
from ptm.engine.disk import path_line
from ptm.engine.eviction import POLICIES
from ptm.engine.layout import Layout, PageMap, Resident
from ptm.engine.open_file import folder_name, lost_layouts, open_file
from ptm.engine.paging import Paging
from ptm.engine.record import Identity
from ptm.engine.reshard import Found
from ptm.engine.states import Store
from ptm.engine.store import PageStore
from ptm.engine.stream import HOST, Streams, streams_of
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
    "Where this layout's page files of the run are."
    streams: Streams = HOST

    @property
    def resident(self) -> Resident:
        return self.budget.resident if self.budget is not None else Resident()

    @property
    def most_reading(self) -> int:
        """Pages of the host that copies to the device may hold: of those that have to leave for
        others a few, else any."""
        if self.budget is None:
            return 1
        return max(1, self.budget.num_frames // (4 if self.budget.is_paged else 1))


class TierOpener:
    """Made with what is known before the layout; called once with it by the engine.

    Raises PlanError, StorageError, CheckpointError on all ranks alike.
    """

    def __init__(
        self,
        config: EngineConfig,
        mesh: Mesh,
        peers: Peers,
        *,
        zero: int,
        run_id: str,
        newest_checkpoint: Callable[[], int | None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
        gpu_bytes: int = 0,
        streams: Streams | None = None,
    ) -> None:
        """newest_checkpoint: the step of the newest good checkpoint of this run, for page files
        that cannot be used; called on all ranks together. say: tells people, a line at a time.
        gpu_bytes: device memory for pages where engine.gpu_bytes names none: the plan's number,
        which rests on activations that were not measured on a device. streams: none are those of
        the mesh's device."""
        self.config, self.mesh, self.peers = config, mesh, peers
        self.zero, self.run_id = zero, run_id
        self.newest_checkpoint, self.say = newest_checkpoint, say
        self.gpu_bytes, self.streams = gpu_bytes, streams or streams_of(mesh.device)

    def __call__(self, pages: PageMap, layout: Layout, compute_bytes: int) -> Tiers:
        config = self.config
        streams, on_gpu = self.streams, self.gpu_bytes
        if config.gpu_bytes is not None:
            on_gpu = parse_bytes(config.gpu_bytes, key="engine.gpu_bytes")
        if config.gpu_bytes is not None and not streams.has_device:
            rule = f"there is no accelerator here, the run is on the {self.mesh.device.type}"
            remedy = "leave it out; engine.cpu_bytes is the memory of the host"
            raise RecipeError(line("engine.gpu_bytes", config.gpu_bytes, rule, remedy))
        budget = make_budget(
            config,
            layout,
            pages,
            zero=self.zero,
            compute_bytes=compute_bytes,
            world=self.mesh.world,
            gpu_bytes=on_gpu if streams.has_device else None,
        )
        describe = describer(pages, layout)
        ssd, step, notes = None, None, []
        if config.ssd_path is not None:
            ssd, step, notes = open_file(
                config.ssd_path,
                self._identity(pages, layout),
                peers=self.peers,
                describe=describe,
                newest_checkpoint=self.newest_checkpoint,
            )
        with ExitStack() as stack:
            if ssd is not None:
                stack.callback(ssd.close)
            host = PageStore(
                num_pages=pages.num_pages,
                page_bytes=pages.page_bytes,
                num_frames=budget.num_frames,
                durable=pages.durable,
                ssd=ssd,
                policy=POLICIES[config.policy](),
                pin=self.mesh.device.type == "cuda",
                describe=describe,
                agree=self.mesh.agreement(config.timeout_s) if ssd is not None else None,
                num_elsewhere=sum(budget.resident),
            )
            stack.pop_all()
            stack.callback(host.close)
            store = host
            if any(budget.resident):
                store = TieredStore(host, pages, budget.resident, streams)
            if ssd is None:
                tiers = Tiers(store, budget=budget, streams=streams)
            else:
                tiers = self._with_disk(store, host, ssd, step, notes, budget, pages)
            stack.pop_all()
            return tiers

    def _with_disk(
        self,
        store: PageStore | TieredStore,
        host: PageStore,
        ssd: SsdTier,
        step: int | None,
        notes: list[str],
        budget: Budget,
        pages: PageMap,
    ) -> Tiers:
        config, restored, paging = self.config, None, None
        if step is not None:
            restored = next((s, meta) for s, meta in host.records() if s == step)
            self.peers.together(lambda: store.restore(step))
        if any(self.peers.together(lambda: budget.is_paged)):
            folder = ssd.path.parent
            rates = self.peers.together(lambda: list(probe(folder, pages.page_bytes, PROBE_S)))
            read_rate, write_rate = rates[self.peers.rank]
            paging = Paging(
                host,
                pages,
                num_frames=budget.num_frames,
                policy=config.policy,
                rates=(read_rate, write_rate),
                commits=config.journal_every == 1,
            )
        elsewhere = self._elsewhere(ssd.identity, -1 if step is None else step, notes)
        for note in [*notes, *([ssd.note] if ssd.note else [])]:
            self.say(note)
        return Tiers(
            store,
            paging,
            restored,
            config.journal_every,
            budget,
            elsewhere,
            ssd.path.parent,
            self.streams,
        )

    def _elsewhere(self, identity: Identity, step: int, notes: list[str]) -> Found | None:
        """A newer step in page files of another layout; all must be on the disk of rank 0."""
        ssd_path = self.config.ssd_path
        assert ssd_path is not None

        def look() -> tuple[list[Any] | None, list[str]]:
            if not self.mesh.is_main:
                return None, []
            found = reshard.find(ssd_path, self.run_id, besides=identity.run_id)
            lost = lost_layouts(ssd_path, self.run_id, besides=identity.run_id)
            return None if found is None or found.step <= step else list(found), lost

        heard, lost = self.peers.together(look)[0]
        if lost and heard is None and step < 0 and self.newest_checkpoint() is None:
            rule = "cannot be used, and there is no checkpoint to go on from: " + " | ".join(lost)
            remedy = "put the files back as they were, or delete them to begin anew"
            raise CheckpointError(path_line(Path(ssd_path), rule, remedy))
        notes += lost
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
            frozen_start=pages.frozen.start,
            frozen_stop=pages.frozen.stop,
        )


def fingerprint(pages: PageMap, layout: Layout) -> str:
    """Equal for equal contents of every page, whatever made them."""
    what = [
        [slot.name, slot.whole_shape, group.cuts, group.base, slot.start]
        for group, slot in layout.slots()
    ]
    fmt = pages.format
    frozen = [[g.base, str(g.held)] for u in layout.units for g in u.groups if g.is_frozen]
    text = json.dumps([what, fmt.weight_bytes, fmt.is_split, fmt.is_int8, *frozen])
    # In words as well, for the line about files of other settings.
    weights, moments = "bf16" if fmt.is_split else "fp32", "int8" if fmt.is_int8 else "fp32"
    return f"{weights}-weights-{moments}-moments-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def describer(pages: PageMap, layout: Layout) -> Callable[[int], str]:
    """Page -> what lies in it, for people: its kind and the tensors it holds parts of."""

    def describe(page: int) -> str:
        kind = next(k for k in (pages.weights, pages.states, pages.grads) if page < k.stop)
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
