"""Seconds of a block and of the root of a job's model on this machine, forward and backward, at its
micro-batch: what a closed form cannot know of caches, shapes of products and small kernels.

Gradients go where they go in a run, into buffers that the blocks use one after another; what the
engine does with them there is counted by ptm/planner/step_time.py.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import replace
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from ptm.common.device import best_device, sync
from ptm.model.context import make_context
from ptm.model.transformer import Transformer
from ptm.planner import states
from ptm.planner.job import Job
from ptm.planner.speed import Timed
from ptm.planner.step_time import flops

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
_JOB_S = 4.0
"""A job whose block and root take longer is not timed."""
_BLOCKS = 2
_REPEATS, _REPEATED_S = 7, 1.5

now_s = time.perf_counter
"""The clock of `Clock`; a test on a busy machine puts that of CPU seconds here."""


def time_job(job: Job, rates: dict[str, Any]) -> dict[str, float] | None:
    """Seconds of a block and of the root; None where that would take too long or too much."""
    layers = min(_BLOCKS, job.model.num_hidden_layers)
    one = replace(job, model=replace(job.model, num_hidden_layers=layers))
    seconds = sum(
        3 * count / rates["flops_per_s"][job.precision][kind] for kind, count in flops(one).items()
    )
    weights = sum(unit.numel for unit in states.layout(one).units) * 3 * job.compute_bytes
    if seconds > _JOB_S or weights > psutil.virtual_memory().available // 4:
        return None
    device = best_device()
    model = Transformer(one.model, dtype=PRECISIONS[job.precision], device=device)
    model.init_weights(0)
    model.train()
    blocks, model.model.layers = model.model.layers, nn.ModuleList()
    rooms: dict[str, Tensor] = {}
    for unit in (*blocks, model):
        _take_gradients(unit, rooms)
    shape = (job.micro_rows, job.seq_len + 1)
    spent: list[tuple[float, ...]] = []
    ends = time.perf_counter() + _REPEATED_S
    while len(spent) < _REPEATS or (time.perf_counter() < ends and len(spent) < 50):
        ids = torch.randint(0, one.model.vocab_size, shape, device=device)
        spent.append(_once(model, blocks, ids))
    names = [field.name for field in dataclasses.fields(Timed)]
    medians = [statistics.median(column) for column in zip(*spent[2:])]
    return dict(zip(names, (job.micro_tokens, *medians)))


def _take_gradients(unit: nn.Module, rooms: dict[str, Tensor]) -> None:
    """Have gradients go where they go in a run (ptm/engine/grads.py): put by kernels, or copied,
    into a buffer that blocks use one after another."""

    def arrived(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        if not parameter.grad.is_sparse:
            parameter.grad_sink.room()[0].copy_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None

    for name, parameter in unit.named_parameters():
        room = rooms.setdefault(name, torch.empty_like(parameter))
        parameter.grad_sink = _Sink(room)  # type: ignore[attr-defined]
        parameter.register_post_accumulate_grad_hook(arrived)


class _Sink:
    def __init__(self, room: Tensor) -> None:
        self._room = room

    def room(self) -> tuple[Tensor, bool]:
        return self._room, False


class _Batch(NamedTuple):
    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor


def _batch(ids: Tensor) -> _Batch:
    """Two documents in a row, so that there are masks, as in a run."""
    inputs = ids[:, :-1].contiguous()
    L = inputs.shape[1]
    places = torch.arange(L, device=ids.device).expand_as(inputs).contiguous()
    is_kept = torch.ones_like(inputs, dtype=torch.bool)
    return _Batch(inputs, ids[:, 1:].contiguous(), is_kept, places, places * 2 // L)


def _once(model: Transformer, blocks: nn.ModuleList, ids: Tensor) -> tuple[float, ...]:
    """Seconds of a block's forward and backward and of the root's, on ids not seen before, as rows
    of experts vary in a run too. More than one block, so that no weights stay in caches."""
    batch = _batch(ids)
    context = make_context(
        model.config,
        batch.input_ids,
        position_ids_BL=batch.position_ids,
        document_ids_BL=batch.document_ids,
    )
    y = model.model.embed_tokens(batch.input_ids).detach().requires_grad_()
    clock = Clock(ids.device)
    for block in blocks:
        y = block(y, context).y_BLD
    block_forward_s = clock.lap() / len(blocks)
    y.backward(torch.full_like(y, 1e-3))
    block_backward_s = clock.lap() / len(blocks)
    loss = model.loss(batch)
    root_forward_s = clock.lap()
    loss.nll_sum.backward()
    return block_forward_s, block_backward_s, root_forward_s, clock.lap()


class Clock:
    """Seconds between laps, with what the device was asked to do in them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last_s = device, now_s()

    def lap(self) -> float:
        sync(self.device)
        before, self.last_s = self.last_s, now_s()
        return self.last_s - before
