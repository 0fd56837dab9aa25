"""The paged engine: the states of one model over ranks and tiers. It has no logic of its own.

    layout.py   which element lies where          weights.py  gather, release
    states.py   numbers in pages                  grads.py    sums to their owners
    page_rows.py  to save, load and fill them     update.py   the optimizer over pages
    store.py    pages in frames and files         hooks.py    when

One step, on every rank:

    1 forward and backward of each micro-batch; hooks gather weights and send gradients
    2 one all-reduce: norm, tokens, loss, flags
    3 skip, or hand the units to the updater: gradient sums x clipping / tokens
    4 the next forward waits for each unit's update when it comes to it

Gradients are sums over tokens; they are divided once, in fp32, by the number of tokens in the step
over all ranks, so neither micro-batches nor ranks weigh in. All decisions (skip, stop) follow from
the all-reduced vector: every rank takes the same branch. Sources: ZeRO, arXiv 1910.02054; pages and
a schedule from a traced step: Angel-PTM, arXiv 2303.02868.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptm.engine import buffers
from ptm.engine.config import EngineConfig, MomentsKind
from ptm.engine.grads import Grads
from ptm.engine.hooks import Hooks
from ptm.engine.layout import Format, Layout, Named, PageMap, Slot, make_layout
from ptm.engine.open_file import forget_other_layouts
from ptm.engine.open_store import Tiers, describer, fingerprint
from ptm.engine.outcome import Outcome, agree, clip_factor
from ptm.engine.page_rows import PageRows
from ptm.engine.reshard import read_into
from ptm.engine.state import StateRows, stored_shape
from ptm.engine.states import PagedStates
from ptm.engine.timing import Decision, Exact, make_timing
from ptm.engine.update import Update, Updater
from ptm.engine.weights import Gathered, Weights, nothing
from ptm.mesh.collectives import all_reduce_sum
from ptm.mesh.mesh import Mesh


@dataclass(frozen=True)
class UnitSpec:
    """A unit before it is placed. `module` is what runs when the unit's weights are wanted."""

    name: str
    module: nn.Module
    members: Sequence[Named]


STATES = {
    "model.": "master",
    "optim.exp_avg.": "exp_avg",
    "optim.exp_avg_sq.": "exp_avg_sq",
}
"""Prefix of a name in `state()` -> what it is."""


def format_of(dtype: torch.dtype, moments: MomentsKind) -> Format:
    """How elements are kept when forward and backward run in `dtype`."""
    is_split = dtype == torch.bfloat16
    return Format(
        weight_bytes=2 if is_split else 4,
        is_split=is_split,
        is_int8=moments is MomentsKind.int8,
    )


class PagedEngine:
    """Owns the model's states. Life: build -> (fill | write into state()) -> [backward.. step]*."""

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[UnitSpec],
        *,
        mesh: Mesh,
        config: EngineConfig,
        zero: int,
        dtype: torch.dtype,
        update: Update,
        clip: float,
        num_exact: int = 0,
        open_tiers: Callable[[PageMap, Layout, int], Tiers],
    ) -> None:
        """The model may be on the meta device; its parameters are replaced. zero: 1, 2 or 3.
        num_exact: steps on time before update=bounded is late.
        open_tiers(pages, layout, bytes of a weight in forward)."""
        self.model, self.mesh, self.config, self.clip = model, mesh, config, clip
        self.updates = 0
        self.buffers = buffers.persistent_buffers(model)
        self._named = [(unit.name, unit.members) for unit in units]
        self._dtype = dtype
        self.layout: Layout = make_layout(
            self._named,
            world=mesh.world,
            ep=config.ep,
            rank=mesh.rank,
        )
        self.pages = PageMap(
            self.layout.numel,
            config.page_bytes,
            format_of(dtype, config.moments),
            trained=self.layout.trained,
        )
        self.tiers = open_tiers(self.pages, self.layout, dtype.itemsize)
        self.store = self.tiers.store
        self.states = PagedStates(
            self.store,
            self.pages,
            dtype,
            streams=self.tiers.streams,
            resident=self.tiers.resident,
            most_reading=self.tiers.most_reading,
        )
        gathered = [
            Gathered(
                unit=unit,
                params=[
                    (group, slot, _replace(model, slot, dtype, mesh.device))
                    for group in unit.groups
                    for slot in group.slots
                ],
                owns_frame=zero < 3 or unit is self.layout.units[0],
            )
            for unit in self.layout.units
        ]
        ahead = None if self.tiers.paging is None else 1
        self.updater = Updater(self.layout, self.states, update, ahead=ahead)
        may_undo = self.tiers.journal_every == 1
        self.timing = make_timing(
            config.update,
            self.updater,
            undo=self.store.undo if may_undo else None,
            num_exact=num_exact,
        )
        self.weights = Weights(
            gathered, self.states, mesh, keep=zero < 3, before_gather=self.timing.before_gather
        )
        self.grads = Grads(gathered, self.states, mesh, self.timing, is_local=zero == 1)
        modules = [unit.module for unit in units]
        self.hooks = Hooks(modules, self.weights, self.timing.weights_read)
        self._is_first = True
        self._has_grads = False
        self._num_commits = 0
        self._commit_waited_s = 0.0
        self._is_committed = False

    @property
    def restored(self) -> tuple[int, dict[str, Any]] | None:
        """The step that was committed last, if any, and its meta; `restore` goes back to it."""
        elsewhere = self.tiers.elsewhere
        return self.tiers.restored if elsewhere is None else (elsewhere.step, elsewhere.meta)

    @property
    def has_frozen(self) -> bool:
        """Whether frozen weights are in pages that were committed, which must not be filled."""
        return self.tiers.restored is not None

    def restore(self) -> None:
        """Make the states those of `restored`; pages are so already, unless others wrote them."""
        if self.restored is not None:
            buffers.from_json(self.buffers, self.restored[1].get("buffers", {}))
        if self.tiers.elsewhere is not None:
            assert self.config.ssd_path is not None
            read_into(
                self.state(),
                self.tiers.elsewhere,
                ssd_path=self.config.ssd_path,
                units=self._named,
                pages=self.pages,
                dtype=self._dtype,
                kinds=STATES,
                fingerprint=fingerprint,
                describer=describer,
            )

    def backward(self, loss: Tensor, *, is_last: bool, tokens: Tensor, lr: float) -> None:
        """Add the gradients of `loss` (a SUM over tokens) to this step's; is_last: of it."""
        if (
            is_last
            and isinstance(self.timing, Exact)
            and self.timing.may_guess
            and self._is_committed
        ):
            group = self.mesh.dp.get_group()
            total = all_reduce_sum(tokens.detach().clone().double(), group, self.mesh.ledger)
            self.timing.guess(self._decision(max(float(total), 1.0), 1.0, lr))
        self._has_grads = True
        self.grads.begin(is_first=self._is_first, is_last=is_last)
        if loss.requires_grad:
            loss.backward()
        self.grads.end()
        self._is_first = is_last

    def _decision(self, total: float, factor: float, lr: float) -> Decision:
        return Decision(1.0 / total * factor, lr, self.updates + 1, total)

    def step(self, *, nll_sum: Tensor, tokens: Tensor, lr: float, flags: list[float]) -> Outcome:
        """Finish the step: decide, and start the update. `flags` come back summed over ranks."""
        if not self._has_grads:  # no backward on any rank: gradients of zero, not the last ones
            self.grads.begin(is_first=True, is_last=True)
            self.grads.end()
        self._has_grads = False
        outcome = agree(
            self.grads.square, nll_sum=nll_sum, tokens=tokens, flags=flags, mesh=self.mesh
        )
        if outcome.is_skipped:
            outcome = outcome._replace(where=self._where_not_finite())
        total = max(float(outcome.tokens), 1.0)
        factor = 0.0 if outcome.is_skipped else clip_factor(outcome.grad_norm, self.clip)
        self.weights.outdated()
        self.hooks.is_first_forward = True
        if isinstance(self.timing, Exact):
            self.timing.is_likely = factor == 1.0
        if self.tiers.paging is not None:
            self.updater.is_inline = self.tiers.paging.border(
                self.timing.kind, finish=self.updater.drain
            )
        decision = None if outcome.is_skipped else self._decision(total, factor, lr)
        self.timing.decided(decision)
        self._wait_commit_before()
        self.updates += not outcome.is_skipped
        self._is_committed = False
        return outcome

    def _wait_commit_before(self) -> None:
        # A step counts once it is logged, and that must not happen while the one before it could
        # still be lost. Late weights have a later commit anyway, and lock_free waits for nothing.
        if self._num_commits and isinstance(self.timing, Exact):
            started = time.perf_counter()
            self.updater.finish_jobs()
            self.store.wait_commit()
            self._commit_waited_s += time.perf_counter() - started

    def publish(self) -> None:
        """Masters or buffers were written: gather anew when next wanted."""
        self.weights.outdated()
        buffers.share(self.buffers, self.mesh)

    def drain(self) -> None:
        """Make all updates that were decided."""
        self.timing.flush()

    @torch.no_grad()
    def fill(self, name: str, value: Tensor) -> None:
        """Set one parameter's master from a whole tensor that every rank holds: weights, or the
        bytes of its rows where it is held as codes."""
        group, slot = next((g, s) for g, s in self.layout.slots() if s.name == name)
        rows = (
            PageRows(self.states, group, slot, "frozen")
            if group.is_frozen
            else self.state()[f"model.{name}"]
        )
        is_held = group.held is not None
        stored = value.view(self._dtype) if is_held else value.reshape(stored_shape(value.shape))
        rows.write(stored[rows.first_row : rows.first_row + rows.num_rows])

    def state(self) -> dict[str, StateRows]:
        """Masters and moments by name, live: read or written before the next step."""
        self.drain()
        found: dict[str, StateRows] = {
            f"model.{name}": buffers.BufferRows(buffer, is_owner=self.mesh.is_main)
            for name, buffer in self.buffers.items()
        }
        return found | {
            prefix + slot.name: PageRows(self.states, group, slot, what)
            for group, slot in self.layout.slots()
            for prefix, what in STATES.items()
            if not group.is_frozen
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every parameter, in order."""
        return {slot.name: slot.whole_shape for _, slot in self.layout.slots()}

    def _where_not_finite(self) -> str:
        # Rare path, taken by all ranks together: name the first parameter with a non-finite
        # gradient anywhere. Ranks hold the same parameters in the same order.
        found = self.grads.non_finite()
        counts = torch.tensor([count for _, count in found], dtype=torch.float64)
        counts = counts.to(self.mesh.device)
        all_reduce_sum(counts, self.mesh.dp.get_group(), self.mesh.ledger)
        bad = [name for (name, _), count in zip(found, counts.tolist()) if count]
        return f"{bad[0]} ({len(bad)} of {len(found)} parameters)" if bad else "the loss"

    def commit(self, step: int, meta: dict[str, Any]) -> None:
        """Once this step's updates are done, in the background: the pages become what a run that
        was killed goes on from. Without a disk there is nothing to do."""
        if self.tiers.journal_every and step % self.tiers.journal_every == 0:
            meta = meta | {"buffers": buffers.to_json(self.buffers)}
            self.timing.then(lambda: self.store.commit(step, meta))
            self._num_commits += 1
            self._is_committed = True
            if self._num_commits == 3 and self.mesh.is_main and self.tiers.folder is not None:
                forget_other_layouts(self.tiers.folder)  # the first commit is on all ranks by now

    def report(self) -> dict[str, float]:
        """Bytes sent by kind of collective, and what the tiers did, since the start."""
        sent = {
            f"{name}_bytes": float(entry.sent_bytes)
            for name, entry in self.mesh.ledger.entries.items()
        }
        pages = {f"pages_{name}": value for name, value in self.store.report().items()}
        waited = {
            "update_waited_s": self.updater.waited_s,
            "commit_waited_s": self._commit_waited_s,
        }
        return sent | pages | waited | self._tier_bytes(pages) | self.timing.report()

    def _tier_bytes(self, pages: dict[str, float]) -> dict[str, float]:
        """What this rank holds of each tier now."""
        if (budget := self.tiers.budget) is None:
            return {}
        used = pages.get("pages_frames_used", 0.0) * budget.page_bytes
        used += budget.beside_bytes
        on_gpu = {"tier_gpu_bytes": float(budget.gpu_bytes)} if budget.has_device else {}
        return on_gpu | {"tier_cpu_bytes": used, "tier_ssd_bytes": float(budget.ssd_bytes)}

    def leave(self, folder: Path) -> None:
        """Where pages moved by a schedule: schedule.txt, schedule.svg and what they are from."""
        if self.tiers.paging is not None:
            self.tiers.paging.save(folder)

    def close(self, *, is_failing: bool = False) -> None:
        """End threads, free memory and files. is_failing: wait for nothing that needs a peer."""
        if not is_failing:
            self.drain()
        self.updater.close()
        self.states.settle(0)
        if self.tiers.journal_every and not is_failing:
            self.store.wait_commit()
            # A rank that left now could cut off the last word of a peer's commit.
            all_reduce_sum(
                torch.zeros(1, device=self.mesh.device), self.mesh.dp.get_group(), self.mesh.ledger
            )
        self.store.close()


def _replace(
    model: nn.Module, slot: Slot, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    """Put a parameter without values in the place of the model's own."""
    owner, _, attribute = slot.name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, attribute)
    new = nn.Parameter(nothing(slot.shape, dtype, device), requires_grad=old.requires_grad)
    setattr(module, attribute, new)
    return new
