"""Settings of the engine that owns parameters, gradients and optimizer states."""

from __future__ import annotations

import dataclasses

from ptm.common.config import Choice, config, ranged
from ptm.common.errors import RecipeError, line
from ptm.common.units import MIB, parse_bytes


class EngineKind(Choice):
    paged = "paged"
    fsdp = "fsdp"
    deepspeed = "deepspeed"


class PolicyKind(Choice):
    next_use = "next_use"
    lru = "lru"


class UpdateKind(Choice):
    exact = "exact"
    bounded = "bounded"
    lock_free = "lock_free"


class MomentsKind(Choice):
    fp32 = "fp32"
    int8 = "int8"


@config
class EngineConfig:
    kind: EngineKind = EngineKind.paged
    "Who owns the states: paged (this engine), fsdp (torch FSDP2), deepspeed (through accelerate)."
    zero: int = ranged(0, least=0, most=3)
    """What is sharded over ranks: 1 optimizer states, 2 gradients too, 3 weights too; 0 takes the
    lowest that fits, or the fastest on a machine that is described (ptm/planner/price.py)."""
    ep: int = ranged(1, least=1, most=4096)
    "Ranks that share one set of experts; divides the ranks and the experts."
    chunks: int = ranged(1, least=1, most=64)
    "Pieces in which rows travel to experts, so that one is computed while the next is on its way."
    page_mib: int = ranged(4, least=1, most=64)
    "Size of a page, the unit that moves between tiers; a power of two (MiB)."
    cpu_bytes: str | None = None
    "Memory of the host for states of one rank, like 2GiB; none takes what the states need."
    gpu_bytes: str | None = None
    """Memory of the accelerator for pages of one rank, beside gathered weights and gradients; none
    takes what the plan leaves beside activations, which no run on a device has confirmed."""
    ssd_path: str | None = None
    "Folder on a disk for pages beyond memory, which are the checkpoint of every step too."
    ssd_bytes: str | None = None
    "Disk of one rank for pages, like 40GiB; none takes what the states need."
    policy: PolicyKind = PolicyKind.next_use
    "Which page leaves memory: the one whose next use is farthest, or the least recently used."
    update: UpdateKind = UpdateKind.exact
    """exact: weights are up to date at every use; bounded: exactly one step late; lock_free: as
    late as the disk makes them, counted."""
    moments: MomentsKind = MomentsKind.fp32
    "Format of moments: fp32, or int8 by blocks: 6.1 bytes a parameter instead of 12."
    journal_every: int = ranged(1, least=1, most=1_000_000)
    "Steps between two commits of the ssd tier: what a kill can cost at most."
    timeout_s: int = ranged(600, least=5, most=86_400)
    "How long a rank waits for its peers before it says which one is missing and leaves."

    def check(self) -> None:
        """Raise RecipeError for sizes that cannot be read and keys that need another."""
        if self.page_mib & (self.page_mib - 1):
            rule = "must be a power of two from 1 to 64 (MiB)"
            raise RecipeError(line("engine.page_mib", self.page_mib, rule, "give 4"))
        for key in ("cpu_bytes", "gpu_bytes", "ssd_bytes"):
            if getattr(self, key) is not None:
                parse_bytes(getattr(self, key), key=f"engine.{key}")
        if self.journal_every > 1 and self.ssd_path is None:
            rule = "needs engine.ssd_path"
            shown = line("engine.journal_every", self.journal_every, rule, "name a folder")
            raise RecipeError(shown)
        if self.kind is not EngineKind.paged:
            self._refuse_ignored()
        if self.ssd_bytes is not None and self.ssd_path is None:
            rule = "needs engine.ssd_path"
            raise RecipeError(line("engine.ssd_bytes", self.ssd_bytes, rule, "name a folder"))

    def _refuse_ignored(self) -> None:
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        for key in ("chunks", "page_mib", "policy", "update", "moments", "journal_every"):
            if getattr(self, key) != plain[key]:
                rule = f"engine.kind={self.kind} does not know it"
                remedy = "use engine.kind=paged, or leave it out"
                raise RecipeError(line(f"engine.{key}", getattr(self, key), rule, remedy))

    @property
    def page_bytes(self) -> int:
        return self.page_mib * MIB
