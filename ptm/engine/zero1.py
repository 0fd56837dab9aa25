"""ZeRO-1 on flat buffers: every rank holds weights and gradients, the fp32 masters and moments are
sharded.

    parameter [d0, ...] -> cut along dim 0 into N equal pieces (the last may be short), as DTensor
    bucket              =  some parameters; its gradients are (N, S): row r is what rank r will own

                 rank 0's piece   rank 1's piece
    embed       [ rows 0..k     | rows k..    ]    one step:
    w1 layer 0  [ experts 0..15 | experts 16..]    1 backward: hooks add each gradient in fp32
    ...                                            2 reduce-scatter: row r summed on rank r
                                                   3 one all-reduce: norm, tokens, loss, flags
                                                   4 AdamW on (S,); 5 all-gather in compute dtype

Gradients are sums over tokens; they are divided once, in fp32, by the number of tokens in the step
over all ranks, so neither micro-batches nor ranks weigh in. All decisions (skip, stop) follow from
the all-reduced vector: every rank takes the same branch. Because pieces are DTensor's, `state()` is
a dict of DTensors that loads onto any world size.

Memory per rank: compute dtype + 4 bytes (gradients) + 12/N bytes a parameter, and one bucket for
communication. Source: ZeRO, arXiv 1910.02054. Not done here: overlap of communication with
backward, tiers, experts over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ptm.engine.config import EngineConfig
from ptm.mesh.collectives import all_gather, all_reduce_sum, reduce_scatter_sum
from ptm.mesh.mesh import Mesh

NORM_PIECE = 2**20
"""Elements whose squares are added up at once."""

Update = Callable[..., None]
"""`update(param, grad=, exp_avg=, exp_avg_sq=, step=, lr=, decay=)` on flat fp32 ranges;
optim.adamw is one."""


class Outcome(NamedTuple):
    """What one step came to, equal on every rank."""

    loss: float
    tokens: int
    grad_norm: float
    is_skipped: bool
    flags: list[float]
    where: str


@dataclass(frozen=True)
class Slot:
    """One parameter's place in its bucket: columns [start, start + size) of (N, S)."""

    name: str
    param: nn.Parameter
    shape: torch.Size
    start: int
    size: int
    rows: int

    def rows_on(self, rank: int) -> int:
        return min(self.rows, max(0, self.shape[0] - rank * self.rows))

    def columns(self, pieces_NS: Tensor) -> Tensor:
        return pieces_NS[:, self.start : self.start + self.size]


class Bucket:
    """Parameters that travel together, with this rank's shard of their states."""

    def __init__(self, members: list[tuple[str, nn.Parameter]], *, decay: bool, mesh: Mesh) -> None:
        self.decay = decay
        self.slots: list[Slot] = []
        start = 0
        for name, param in members:
            rows = -(-param.shape[0] // mesh.world)
            size = rows * math.prod(param.shape[1:])
            self.slots.append(Slot(name, param, param.shape, start, size, rows))
            start += size
        fp32 = {"dtype": torch.float32, "device": mesh.device}
        self.grads_NS = torch.zeros(mesh.world, start, **fp32)
        self.master_S, self.exp_avg_S, self.exp_avg_sq_S = (
            torch.zeros(start, **fp32) for _ in range(3)
        )


class Zero1Engine:
    """Owns the model's states. The model's parameters hold the compute dtype, and no meaning until
    `publish`.

    Life: build -> (fill every master | load into state()) -> publish -> [backward ... step]*.
    """

    def __init__(
        self, model: nn.Module, *, mesh: Mesh, config: EngineConfig, update: Update, clip: float
    ) -> None:
        self.model, self.mesh, self.update, self.clip = model, mesh, update, clip
        self.updates = 0
        self.buckets = list(_buckets(model, config.bucket_mib * 2**20, mesh))
        for bucket, slot in self.slots():
            slot.param.register_post_accumulate_grad_hook(
                _accumulate_into(slot.columns(bucket.grads_NS), slot)
            )

    def slots(self) -> Iterator[tuple[Bucket, Slot]]:
        for bucket in self.buckets:
            for slot in bucket.slots:
                yield bucket, slot

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (a SUM over tokens) to this step's."""
        loss.backward()

    def step(self, *, nll_sum: Tensor, tokens: Tensor, lr: float, flags: list[float]) -> Outcome:
        """Finish the step: reduce, decide, update, publish. `flags` come back summed over ranks."""
        group = self.mesh.dp.get_group()
        shards = [
            reduce_scatter_sum(bucket.grads_NS, group, self.mesh.ledger) for bucket in self.buckets
        ]
        square = sum(_square(shard_S) for shard_S in shards)
        said = [square, float(tokens), float(nll_sum), *flags]
        heard = torch.tensor(said, dtype=torch.float64)
        heard = all_reduce_sum(heard.to(self.mesh.device), group, self.mesh.ledger).tolist()
        total = max(heard[1], 1.0)
        norm = math.sqrt(heard[0]) / total if heard[0] >= 0 else math.nan
        is_finite = math.isfinite(norm) and math.isfinite(heard[2])
        where = "" if is_finite else self._where_not_finite(shards)
        if is_finite:
            self._update(shards, scale=1.0 / total * _clip_factor(norm, self.clip), lr=lr)
        for bucket in self.buckets:
            bucket.grads_NS.zero_()
        return Outcome(heard[2] / total, int(heard[1]), norm, not is_finite, heard[3:], where)

    def _update(self, shards: list[Tensor], *, scale: float, lr: float) -> None:
        self.updates += 1
        for bucket, grad_S in zip(self.buckets, shards):
            self.update(
                bucket.master_S,
                grad=grad_S.mul_(scale),
                exp_avg=bucket.exp_avg_S,
                exp_avg_sq=bucket.exp_avg_sq_S,
                step=self.updates,
                lr=lr,
                decay=bucket.decay,
            )
            self._publish(bucket)

    def publish(self) -> None:
        """Make the weights equal to the masters, rounded to the compute dtype, on every rank."""
        for bucket in self.buckets:
            self._publish(bucket)

    @torch.no_grad()
    def _publish(self, bucket: Bucket) -> None:
        shard_S = bucket.master_S.to(bucket.slots[0].param.dtype)
        gathered_NS = all_gather(shard_S, self.mesh.dp.get_group(), self.mesh.ledger)
        for slot in bucket.slots:
            rows = slot.columns(gathered_NS).reshape(-1, *slot.shape[1:])
            slot.param.copy_(rows[: slot.shape[0]])

    @torch.no_grad()
    def fill(self, name: str, value: Tensor) -> None:
        """Set one parameter's master from a whole tensor that every rank holds."""
        for bucket, slot in self.slots():
            if slot.name == name:
                mine = value.narrow(0, *_narrow(slot, self.mesh.rank))
                self._local(bucket.master_S, slot).copy_(mine)
                return
        raise KeyError(name)

    def _local(self, shard_S: Tensor, slot: Slot) -> Tensor:
        whole = shard_S[slot.start : slot.start + slot.size].view(slot.rows, *slot.shape[1:])
        return whole[: slot.rows_on(self.mesh.rank)]

    def state(self) -> dict[str, Tensor]:
        """Masters and moments as DTensors that are views of the live buffers: copy before the next
        step."""
        kinds = {
            "model.": "master_S",
            "optim.exp_avg.": "exp_avg_S",
            "optim.exp_avg_sq.": "exp_avg_sq_S",
        }
        found: dict[str, Tensor] = {}
        for bucket, slot in self.slots():
            stride = torch.empty(slot.shape, device="meta").stride()
            for prefix, attribute in kinds.items():
                local = self._local(getattr(bucket, attribute), slot)
                found[prefix + slot.name] = DTensor.from_local(
                    local,
                    self.mesh.dp,
                    [Shard(0)],
                    run_check=False,
                    shape=slot.shape,
                    stride=stride,
                )
        return found

    def _where_not_finite(self, shards: list[Tensor]) -> str:
        # Rare path, taken by all ranks together: name the first parameter with a non-finite
        # gradient anywhere.
        slots = list(self.slots())
        local = [
            (~shard_S[slot.start : slot.start + slot.size].isfinite()).sum()
            for bucket, shard_S in zip(self.buckets, shards)
            for slot in bucket.slots
        ]
        counts = torch.stack(local).to(torch.float64)
        all_reduce_sum(counts, self.mesh.dp.get_group(), self.mesh.ledger)
        bad = [(int(n), slot.name) for n, (_, slot) in zip(counts.tolist(), slots) if n]
        return f"{bad[0][1]} ({len(bad)} of {len(slots)} parameters)" if bad else "the loss"

    def leave(self, folder: Path) -> None:
        """No pages, so no schedule of them."""

    def report(self) -> dict[str, float]:
        ledger = self.mesh.ledger
        return {f"{name}_bytes": float(entry.sent_bytes) for name, entry in ledger.entries.items()}


def _square(shard_S: Tensor) -> float:
    # In fp64, piece by piece: torch would widen the whole shard at once.
    norms = (torch.linalg.vector_norm(p, dtype=torch.float64) for p in shard_S.split(NORM_PIECE))
    return sum(float(norm) ** 2 for norm in norms)


def _buckets(model: nn.Module, bucket_bytes: int, mesh: Mesh) -> Iterator[Bucket]:
    # Norms and biases get no weight decay (Megatron's rule), so they have buckets of their own.
    named = list(model.named_parameters())
    for decay in (True, False):
        members: list[tuple[str, nn.Parameter]] = []
        for name, param in (pair for pair in named if (pair[1].dim() > 1) == decay):
            members.append((name, param))
            if sum(4 * p.numel() for _, p in members) >= bucket_bytes:
                yield Bucket(members, decay=decay, mesh=mesh)
                members = []
        if members:
            yield Bucket(members, decay=decay, mesh=mesh)


def _accumulate_into(columns: Tensor, slot: Slot) -> Callable[[Tensor], None]:
    world = columns.shape[0]

    @torch.no_grad()
    def hook(param: Tensor) -> None:
        assert param.grad is not None
        if slot.shape[0] == world * slot.rows:
            columns.add_(param.grad.reshape(world, slot.size))
        else:
            for rank in range(world):
                piece = param.grad.narrow(0, *_narrow(slot, rank)).reshape(-1)
                columns[rank, : piece.numel()].add_(piece)
        param.grad = None

    return hook


def _narrow(slot: Slot, rank: int) -> tuple[int, int]:
    return min(rank * slot.rows, slot.shape[0]), slot.rows_on(rank)


def _clip_factor(norm: float, clip: float) -> float:
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0
