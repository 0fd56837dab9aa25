"""engine.kind=deepspeed: DeepSpeed's ZeRO 1 to 3 behind the engine seam, set up by accelerate's
plugin.

    our key                      DeepSpeed's
    zero                         zero_optimization.stage
    cpu_bytes (any size)         offload_optimizer, at stage 3 offload_param, to cpu
    ssd_path                     the same to nvme, stage 3 only, needs DeepSpeed's op async_io

DeepSpeed averages gradients over ranks and unscales them by a loss scale in its step. Ours are sums
over tokens to be divided once by all tokens of the step, known only then: tokens / ranks is given
as the scale of that step, and clipping then means what it means in the other engines. DeepSpeed
skips a step whose gradients are not finite, on all ranks, and keeps no word of where.

States are shown in even row ranges; DeepSpeed holds them in flat partitions that split rows. So
`state` gathers every tensor once and copies this rank's rows, and `publish` sends back the rows
that were written: collective calls, three copies of the states over all ranks.

accelerate's own Accelerator cannot be used: 1.15 asks for the transformers package. Its plugin
checks the settings and makes the configuration, and deepspeed.initialize takes that. No op is
compiled just in time (it takes minutes, and a kill leaves a lock): torch's AdamW is the optimizer.
Gradients at zero=1 add up in the computing type, as DeepSpeed does there. Experts are stacked
tensors that every micro-batch uses, so none can be waited for in vain, and no leaf modules are set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptm.common import env
from ptm.common.errors import KernelError, RecipeError, line
from ptm.engine.config import EngineConfig
from ptm.engine.outcome import Outcome, agree
from ptm.engine.state import StateRows, row_numel, stored_shape
from ptm.mesh.collectives import gather
from ptm.mesh.mesh import Mesh
from ptm.optim.config import OptimConfig
from ptm.parallel.entries import enter_as_one

KINDS = {"model.": None, "optim.exp_avg.": "exp_avg", "optim.exp_avg_sq.": "exp_avg_sq"}
"""Prefix of a name in `state()` -> DeepSpeed's key; None is the master."""


@dataclass
class CopiedRows:
    """Rows copied out of a flat partition; `is_written` says that they go back."""

    shape: tuple[int, ...]
    first_row: int
    num_rows: int
    values: Tensor
    is_written: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def read(self) -> Tensor:
        return self.values

    def write(self, rows: Tensor) -> None:
        self.values.copy_(rows)
        self.is_written = True


class DeepspeedEngine:
    """Owns the states of `model`, whole at first on every rank: DeepSpeed cuts it up.

    Life: build -> (fill | write every row of state()) -> publish -> [backward ... step]*.
    """

    restored, has_frozen = None, False
    """Nothing is found on a disk: DeepSpeed's offloaded states die with the process."""

    def __init__(
        self,
        model: nn.Module,
        *,
        mesh: Mesh,
        config: EngineConfig,
        optim: OptimConfig,
        clip: float,
        may_compile: bool = False,
    ) -> None:
        """The model has its memory (not on the meta device). may_compile: let DeepSpeed build ops
        that were not built ahead, for a benchmark of those."""
        deepspeed = imported(mesh)
        refuse(config)
        stage = config.zero or 3
        if not may_compile:
            forbid_compiling(deepspeed, config)
        self.model, self.mesh, self.stage, self.updates = model, mesh, stage, 0
        named = dict(model.named_parameters())
        self._shapes = {name: tuple(param.shape) for name, param in named.items()}
        self.params = {name: param for name, param in named.items() if param.requires_grad}
        self.frozen = {name: param for name, param in named.items() if not param.requires_grad}
        self.head: nn.Parameter | None = getattr(model, "head_weight", None)
        self.dtype = next(iter(named.values())).dtype
        numel = sum(param.numel() for param in named.values())
        settings = settings_for(
            config, stage=stage, world=mesh.world, dtype=self.dtype, clip=clip, numel=numel
        )
        enter_as_one(model, lambda *args, **kwargs: self.engine(*args, **kwargs))
        self.engine: Any = deepspeed.initialize(
            model=model,
            optimizer=_adamw(self.params.values(), optim),
            config=_by_accelerate(settings),
            dist_init_required=False,
        )[0]
        if stage == 3 and self.head is not None:  # used outside of its own module
            deepspeed.zero.register_external_parameter(model, self.head)
        self._make_moments()
        self._rows: dict[str, CopiedRows] = {}

    @property
    def _zero(self) -> Any:
        return self.engine.optimizer

    def restore(self) -> None:
        raise AssertionError("nothing to restore")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def backward(
        self, loss: Tensor, *, is_last: bool, tokens: Tensor | None = None, lr: float = 0.0
    ) -> None:
        """Add the gradients of `loss` (a SUM over tokens) to this step's."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss)

    def step(self, *, nll_sum: Tensor, tokens: Tensor, lr: float, flags: list[float]) -> Outcome:
        """Let DeepSpeed clip, guard and update, with our scale and our count of steps."""
        heard = agree(0.0, nll_sum=nll_sum, tokens=tokens, flags=flags, mesh=self.mesh)
        if heard.is_skipped:
            self._poison()
        for group in self._zero.param_groups:
            group["lr"] = lr
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(float(self.updates))
        self._zero.loss_scale = max(heard.tokens, 1) / self.mesh.world
        self.engine.step()
        self._zero.loss_scale = 1.0
        is_skipped = bool(self._zero.overflow)
        self.updates += not is_skipped
        norm = math.nan if is_skipped else float(self.engine.get_global_grad_norm())
        where = "a gradient (DeepSpeed does not say which)" if is_skipped else ""
        return heard._replace(grad_norm=norm, is_skipped=is_skipped, where=where)

    def _poison(self) -> None:
        # A loss that is not finite skips the step even where the gradients are.
        from deepspeed.utils import safe_set_full_grad

        name = min(self.params, key=lambda n: math.prod(self._shapes[n]))
        bad = torch.full(self._shapes[name], math.nan, device=self.mesh.device)
        safe_set_full_grad(self.params[name], bad)

    def fill(self, name: str, value: Tensor) -> None:
        """Set one parameter's master, and its weight, from a whole tensor that every rank holds."""
        if name in self.frozen:
            self._place(self.frozen[name], self._shapes[name], value)
        else:
            self._set(name, None, value)

    def state(self) -> dict[str, StateRows]:
        """Copies of this rank's rows; all ranks call it together."""
        self._rows = {}
        for name in self.params:
            stored = stored_shape(self._shapes[name])
            first = stored[0] * self.mesh.rank // self.mesh.world
            last = stored[0] * (self.mesh.rank + 1) // self.mesh.world
            for prefix, key in KINDS.items():
                rows = self._get(name, key).reshape(stored)[first:last].cpu().clone()
                self._rows[prefix + name] = CopiedRows(stored, first, last - first, rows)
        return dict(self._rows)

    def publish(self) -> None:
        """Send the rows that were written since `state` to where DeepSpeed keeps them."""
        written = torch.tensor([float(rows.is_written) for rows in self._rows.values()])
        if not len(written):
            return
        anywhere = self.mesh.sum_counts(written.to(self.mesh.device)).tolist()
        for (name, rows), count in zip(self._rows.items(), anywhere):
            if count:
                prefix = next(p for p in KINDS if name.startswith(p))
                self._set(name.removeprefix(prefix), KINDS[prefix], self._whole(rows))
        self._rows = {}

    def _whole(self, rows: CopiedRows) -> Tensor:
        world, per_row = self.mesh.world, row_numel(rows.shape)
        cuts = [rows.shape[0] * r // world * per_row for r in range(world + 1)]
        full = torch.empty(cuts[-1], dtype=torch.float32, device=self.mesh.device)
        full[cuts[self.mesh.rank] : cuts[self.mesh.rank + 1]] = rows.values.reshape(-1)
        gather(full, cuts, self.mesh.dp.get_group(), self.mesh.ledger, name="state").wait()
        return full

    def _get(self, name: str, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        param = self.params[name]
        found = (
            safe_get_full_fp32_param(param)
            if key is None
            else safe_get_full_optimizer_state(param, key)
        )
        assert found is not None, (name, key)
        return found

    @torch.no_grad()
    def _set(self, name: str, key: str | None, value: Tensor) -> None:
        from deepspeed import utils

        param, shape = self.params[name], self._shapes[name]
        value = value.reshape(shape).to(self.mesh.device, torch.float32)
        # At stage 3 the calls for whole tensors fail where ranks do not divide the elements.
        if key is not None and self.stage < 3:
            utils.safe_set_full_optimizer_state(param, value, key)
        elif key is not None:
            utils.safe_set_local_optimizer_state(param, self._part(param, value), key)
        elif self.stage < 3:
            utils.safe_set_full_fp32_param(param, value)
        else:
            utils.safe_set_local_fp32_param(param, self._part(param, value))
        if key is None:
            self._place(param, shape, value)

    @torch.no_grad()
    def _place(self, param: nn.Parameter, shape: tuple[int, ...], value: Tensor) -> None:
        """Set a weight as forward and backward read it."""
        value = value.reshape(shape).to(self.mesh.device)
        if self.stage == 3:
            shard: Tensor = param.ds_tensor  # type: ignore[attr-defined]
            shard.copy_(self._part(param, value))
        if param.numel() == value.numel():  # at stage 3 small ones stay whole
            param.copy_(value)

    def _part(self, param: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor at stage 3."""
        shard: Tensor = param.ds_tensor  # type: ignore[attr-defined]
        padded = value.new_zeros(shard.numel() * self.mesh.world)
        padded[: value.numel()] = value.reshape(-1)
        return padded.view(self.mesh.world, -1)[self.mesh.rank]

    def _make_moments(self) -> None:
        # DeepSpeed makes them in its first step; a run that goes on has some to write before.
        zero = self._zero
        flats = getattr(zero, "fp32_partitioned_groups_flat", None)
        flats = getattr(zero, "single_partition_of_fp32_groups", flats)
        if flats is None:
            rule = f"its {type(zero).__name__} keeps no flat fp32 partitions"
            raise KernelError(line("deepspeed", version(), rule, "use deepspeed 0.19"))
        for flat in flats:
            zero.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def drain(self) -> None:
        """Nothing is under way between steps."""

    def commit(self, step: int, meta: dict[str, Any]) -> None:
        """Nothing is kept but by a checkpoint."""

    def close(self, *, is_failing: bool = False) -> None:
        self.engine.destroy()

    def leave(self, folder: Path) -> None:
        """No pages, so no schedule of them."""

    def report(self) -> dict[str, float]:
        """Only what ptm itself sends; DeepSpeed's collectives do not pass the ledger."""
        ledger = self.mesh.ledger
        return {f"{name}_bytes": float(entry.sent_bytes) for name, entry in ledger.entries.items()}


def settings_for(
    config: EngineConfig, *, stage: int, world: int, dtype: torch.dtype, clip: float, numel: int
) -> dict[str, Any]:
    """DeepSpeed's configuration of our keys."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(numel, 500_000_000)}
    place: dict[str, Any] = {}
    if config.ssd_path is not None:
        place = {"device": "nvme", "nvme_path": config.ssd_path}
    elif config.cpu_bytes is not None:
        place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if place:
        zero["offload_optimizer"] = dict(place)
        if stage == 3:
            zero["offload_param"] = dict(place)
    settings: dict[str, Any] = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if stage > 1:  # at stage 1 another optimizer would be taken, which knows no loss scale
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def refuse(config: EngineConfig) -> None:
    """Raise RecipeError for what only the paged engine can do."""
    remedy = "use engine.kind=paged, or leave it out"
    if config.ep > 1:
        rule = "engine.kind=deepspeed keeps all experts on every rank"
        raise RecipeError(line("engine.ep", config.ep, rule, remedy))
    if config.gpu_bytes is not None:
        rule = "DeepSpeed offloads all states or none"
        raise RecipeError(line("engine.gpu_bytes", config.gpu_bytes, rule, remedy))
    offloads = config.ssd_path or config.cpu_bytes
    if offloads and config.zero == 1:
        rule = "DeepSpeed offloads at zero 2 and 3"
        raise RecipeError(line("engine.zero", 1, rule, "give 2 or 3, or use engine.kind=paged"))
    if config.ssd_path and config.zero == 2:
        rule = "DeepSpeed uses a disk at zero 3 only"
        raise RecipeError(line("engine.zero", 2, rule, "give 3, or use engine.kind=paged"))


def forbid_compiling(deepspeed: Any, config: EngineConfig) -> None:
    """Have DeepSpeed raise KernelError where it would compile an op."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.builder import OpBuilder

    if config.ssd_path is not None and not installed_ops.get("async_io"):
        rule = f"DeepSpeed {version()} needs its op async_io for a disk, which is not built here"
        remedy = "install libaio-dev, then deepspeed with DS_BUILD_AIO=1, or use engine.kind=paged"
        raise KernelError(line("engine.ssd_path", config.ssd_path, rule, remedy))

    def jit_load(self: Any, verbose: bool = True) -> Any:
        rule = f"its op {self.name} is not built, and none is compiled in a run"
        remedy = "install deepspeed with DS_BUILD_OPS=1, or use engine.kind=paged"
        raise KernelError(line("deepspeed", version(), rule, remedy))

    OpBuilder.jit_load = jit_load
    if not installed_ops.get("deepspeed_shm_comm"):  # an option: it goes on without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def version() -> str:
    import deepspeed

    return str(deepspeed.__version__)


def imported(mesh: Mesh) -> Any:
    """The library, told what it would guess. Raises KernelError where it is missing."""
    env.set_default("DS_BUILD_OPS", "0")
    env.set_default("LOCAL_RANK", str(env.ranks().local_rank))  # without torchrun it asks for this
    if mesh.device.type == "cpu":
        env.set_default("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        remedy = "pip install 'deepspeed>=0.19'"
        raise KernelError(line("engine.kind", "deepspeed", f"{error}", remedy)) from error
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


def _by_accelerate(settings: dict[str, Any]) -> dict[str, Any]:
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
    return plugin.deepspeed_config


def _adamw(params: Any, optim: OptimConfig) -> torch.optim.Optimizer:
    params = list(params)
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=1.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
