"""engine.kind=fsdp: torch's FSDP2 behind the engine seam, with ptm's collectives plugged in.

    each block and the rest (embedding, final norm, head) are one `fully_shard` unit; fp32 shards,
    bf16 for computing

    zero=3    gather in a block's forward and backward, reduce after each micro-batch
    zero=2    gather once a step, reduce after each micro-batch
    zero=1    gather once a step, add up in fp32 and reduce once a step

FSDP2 takes any all-gather and reduce-scatter that have its two methods, so gloo's, which send 1.33
and 1.33 to 2 times the bytes that are needed, are replaced by those of ptm/mesh/collectives.py.
Gradients travel in the computing type and are summed in fp32.

The engine's arithmetic is ptm's: sums over tokens, divided once; a step that is not finite is
skipped on all ranks; AdamW on fp32 shards. FSDP2 cuts a parameter along its first dim in equal
parts, so experts are shared out whole.

Not done here: pages, tiers, expert parallelism (engine.kind=paged has them). Traps of FSDP2 that
this file steps around: its gradient average needs a reduction that gloo refuses (a factor of 1 and
plain sums are asked for); it casts the inputs of blocks, which would round rotary angles to bf16
(switched off); entering a unit twice, as `loss` does by calling `hidden`, would register it twice;
at its first use a unit reads its parameters by name once more, when an adapter may read otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ptm.common.errors import KernelError, RecipeError, line
from ptm.engine.config import EngineConfig
from ptm.engine.outcome import Outcome, agree, clip_factor, squares, where_not_finite
from ptm.engine.state import StateRows
from ptm.mesh.collectives import Ledger, gather, scatter_sum
from ptm.mesh.mesh import Mesh
from ptm.parallel.entries import enter_as_one
from ptm.parallel.rows import rows_of

NEEDED = (
    "set_requires_gradient_sync",
    "set_reshard_after_backward",
    "set_gradient_divide_factor",
    "set_force_sum_reduction_for_comms",
    "set_custom_all_gather",
    "set_custom_reduce_scatter",
    "reshard",
)


class Gather:
    """All-gather as FSDP2 calls it; the input is this rank's range of the output."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        size, rank = input_tensor.numel(), group.rank()
        mine = output_tensor[rank * size : (rank + 1) * size]
        if mine.data_ptr() != input_tensor.data_ptr():
            mine.copy_(input_tensor)
        cuts = [i * size for i in range(group.size() + 1)]
        gather(output_tensor, cuts, group, self.ledger).wait()


class ScatterSum:
    """Reduce-scatter as FSDP2 calls it; it allocates the input, then the output, and calls.

    The output is fp32 whatever FSDP2 asks for, so that the sum is: FSDP2 widens it next anyway.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.is_output = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: Any) -> Tensor:
        wide = torch.float32 if self.is_output else dtype
        self.is_output = not self.is_output
        return torch.empty(*size, dtype=wide, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert getattr(op, "name", str(op)) == "SUM", op
        assert output_tensor.dtype == torch.float32, output_tensor.dtype
        size = output_tensor.numel()
        cuts = [i * size for i in range(group.size() + 1)]
        scatter_sum(input_tensor, cuts, group, self.ledger).add_to(output_tensor.zero_())


class FsdpEngine:
    """Owns the states of `model`, whose parameters become shards.

    Life: build -> (write every row of state()) -> publish -> [backward ... step]*. The model may be
    on the meta device; then no rank ever holds it whole. The type of its parameters is the one it
    computes in.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        units: Iterable[nn.Module],
        mesh: Mesh,
        config: EngineConfig,
        update: Callable[..., None],
        clip: float,
        is_stock: bool = False,
    ) -> None:
        """units: modules that are gathered one at a time (the blocks); what is left is one more.
        is_stock: keep torch's own collectives, for comparison. update: as optim.adamw, on flat
        fp32 ranges."""
        refuse(config)
        self.model, self.mesh, self.update, self.clip = model, mesh, update, clip
        self.zero = config.zero or 3
        self.updates = 0
        units = list(units)
        self.first = [model, *units[:1]]
        shard(model, units, mesh, zero=self.zero, is_stock=is_stock)
        named: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._shapes = {name: tuple(param.shape) for name, param in named.items()}
        self.frozen = {name: param for name, param in named.items() if not param.requires_grad}
        self.params = {name: param for name, param in named.items() if param.requires_grad}
        self.masters = {name: _local(param) for name, param in self.params.items()}
        self.exp_avg, self.exp_avg_sq = (
            {name: torch.zeros_like(master) for name, master in self.masters.items()}
            for _ in range(2)
        )

    restored, has_frozen = None, False
    """No tier of this engine survives a process."""

    def restore(self) -> None:
        raise AssertionError("nothing to restore")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    @torch.no_grad()
    def fill(self, name: str, value: Tensor) -> None:
        """Set one parameter's master from a whole fp32 tensor that every rank holds."""
        param = self.frozen[name] if name in self.frozen else self.params[name]
        mine, first = _local(param), _first_row(param, self.mesh)
        mine.copy_(value[first : first + len(mine)])

    def backward(
        self, loss: Tensor, *, is_last: bool, tokens: Tensor | None = None, lr: float = 0.0
    ) -> None:
        """Add the gradients of `loss` (a SUM over tokens) to this step's."""
        if self.zero == 1:
            self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        for module in self.first if self.zero == 3 else ():  # wanted first in the next forward
            module.set_reshard_after_backward(is_last, recurse=False)  # type: ignore[operator]
        loss.backward()

    @torch.no_grad()
    def step(self, *, nll_sum: Tensor, tokens: Tensor, lr: float, flags: list[float]) -> Outcome:
        """Decide over all ranks, update the shards, drop the gradients."""
        self._reshard()
        grads = {name: _local_grad(param) for name, param in self.params.items()}
        square = squares(g for g in grads.values() if g is not None)
        outcome = agree(square, nll_sum=nll_sum, tokens=tokens, flags=flags, mesh=self.mesh)
        if outcome.is_skipped:
            where = where_not_finite(list(grads), list(grads.values()), self.mesh)
            outcome = outcome._replace(where=where)
        else:
            scale = clip_factor(outcome.grad_norm, self.clip) / max(outcome.tokens, 1)
            self._update(grads, scale=scale, lr=lr)
        for param in self.params.values():
            param.grad = None
        return outcome

    def _update(self, grads: dict[str, Tensor | None], *, scale: float, lr: float) -> None:
        self.updates += 1
        for name, master in self.masters.items():
            grad = grads[name]
            if not master.numel():
                continue
            self.update(
                master.view(-1),
                grad=torch.zeros_like(master).view(-1)
                if grad is None
                else grad.view(-1).mul_(scale),
                exp_avg=self.exp_avg[name].view(-1),
                exp_avg_sq=self.exp_avg_sq[name].view(-1),
                step=self.updates,
                lr=lr,
                decay=self.params[name].dim() > 1,
            )

    def state(self) -> dict[str, StateRows]:
        """This rank's rows of masters and moments, views of the live shards."""
        kinds = {
            "model.": self.masters,
            "optim.exp_avg.": self.exp_avg,
            "optim.exp_avg_sq.": self.exp_avg_sq,
        }
        found: dict[str, StateRows] = {}
        for name, param in self.params.items():
            first = _first_row(param, self.mesh) * param[:1].numel()
            for prefix, tensors in kinds.items():
                found[prefix + name] = rows_of(tensors[name], param.shape, first)
        return found

    def publish(self) -> None:
        """Let the next forward gather the masters anew."""
        self._reshard()

    def drain(self) -> None:
        """Nothing is under way between steps."""

    def commit(self, step: int, meta: dict[str, Any]) -> None:
        """Nothing is kept but by a checkpoint."""

    def close(self, *, is_failing: bool = False) -> None:
        """Nothing to release."""

    def leave(self, folder: Path) -> None:
        """No pages, so no schedule of them."""

    def report(self) -> dict[str, float]:
        ledger = self.mesh.ledger
        return {f"{name}_bytes": float(entry.sent_bytes) for name, entry in ledger.entries.items()}

    def _reshard(self) -> None:
        # An evaluation leaves the root gathered, and zero < 3 the blocks too.
        for module in self.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]


def shard(
    model: nn.Module, units: list[nn.Module], mesh: Mesh, *, zero: int, is_stock: bool
) -> None:
    """Apply fully_shard to the units and the root, in fp32 with the model's own type for computing;
    frozen parameters stay in that.

    Modifies: the model, which is materialised if it is on the meta device.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    compute = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute,
        reduce_dtype=torch.float32 if zero == 1 else None,
        cast_forward_inputs=False,
    )
    trained = [param for param in model.parameters() if param.requires_grad]
    for tensor in [*trained, *(b for b in model.buffers() if b.is_floating_point())]:
        tensor.data = tensor.data.float()
    for unit in [*units, model]:
        fully_shard(
            unit,
            mesh=mesh.dp,
            mp_policy=policy,
            # The last unit's backward follows its forward at once, as the root's does.
            reshard_after_forward=zero == 3 and unit not in [*units[-1:], model],
        )
    check_names(model)
    for unit in [*units, model]:
        unit.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        unit.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        if not is_stock:
            unit.set_custom_all_gather(Gather(mesh.ledger))  # type: ignore[operator]
            unit.set_custom_reduce_scatter(ScatterSum(mesh.ledger))  # type: ignore[operator]
    model.set_reshard_after_backward(zero == 3)  # type: ignore[operator]
    if any(param.is_meta for param in model.parameters()):
        _materialise(model, mesh.device)
    for unit in [*units, model]:  # FSDP2 reads parameters by name once more, at their first use
        unit.unshard()  # type: ignore[operator]
        unit.reshard()  # type: ignore[operator]
    enter_as_one(model, model)


def check_names(model: nn.Module) -> None:
    """Raise KernelError where this torch's FSDP2 lacks what is used here."""
    missing = [name for name in NEEDED if not hasattr(model, name)]
    if missing:
        rule = f"its FSDP2 has no {', '.join(missing)}"
        raise KernelError(line("torch", torch.__version__, rule, "use torch 2.11 to 2.13"))


def refuse(config: EngineConfig) -> None:
    """Raise RecipeError for what only the paged engine can do."""
    if config.ep > 1:
        rule = "engine.kind=fsdp keeps all experts on every rank"
        raise RecipeError(line("engine.ep", config.ep, rule, "use engine.kind=paged, or ep=1"))
    for key in ("cpu_bytes", "gpu_bytes", "ssd_path"):
        if getattr(config, key) is not None:
            rule = "engine.kind=fsdp has no tiers"
            remedy = "use engine.kind=paged, or leave it out"
            raise RecipeError(line(f"engine.{key}", getattr(config, key), rule, remedy))


def _materialise(model: nn.Module, device: torch.device) -> None:
    # to_empty forgets buffers too; one on the meta device holds nothing, and starts from zero.
    kept = {name: None if b.is_meta else b.clone() for name, b in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        value = kept[name]
        buffer.zero_() if value is None else buffer.copy_(value)


def _local(param: nn.Parameter) -> Tensor:
    shard = param.detach()
    assert isinstance(shard, DTensor)
    return shard.to_local()


def _local_grad(param: nn.Parameter) -> Tensor | None:
    return param.grad.to_local() if isinstance(param.grad, DTensor) else None


def _first_row(param: nn.Parameter, mesh: Mesh) -> int:
    rows = -(-param.shape[0] // mesh.world)
    return min(mesh.rank * rows, param.shape[0])
