"""Models on the engines that are libraries behind the seam, FSDP2 and DeepSpeed, with the adapter
of the recipe, if any."""

from __future__ import annotations

import functools

import torch

from ptm.engine.config import EngineConfig, EngineKind
from ptm.mesh.mesh import Mesh
from ptm.model.adapter import add_adapter, use_adapter
from ptm.model.config import ModelConfig
from ptm.model.lora_config import ALL_WEIGHTS, AdapterConfig
from ptm.model.transformer import Transformer
from ptm.optim.adamw import adamw
from ptm.optim.config import OptimConfig
from ptm.parallel import deepspeed, fsdp
from ptm.parallel.recompute import recompute_blocks


def adapted_engine(
    model: ModelConfig,
    *,
    mesh: Mesh,
    engine: EngineConfig,
    optim: OptimConfig,
    dtype: torch.dtype,
    clip: float,
    recompute: bool,
    adapter: AdapterConfig = ALL_WEIGHTS,
    is_stock: bool = False,
    may_compile: bool = False,
) -> tuple[Transformer, fsdp.FsdpEngine | deepspeed.DeepspeedEngine]:
    """A model without values and its engine, by `engine.kind`. Raises RecipeError, KernelError.

    is_stock: FSDP2 with torch's own collectives. may_compile: DeepSpeed may build its ops.
    """
    is_fsdp = engine.kind is EngineKind.fsdp
    (fsdp.refuse if is_fsdp else deepspeed.refuse)(engine)  # before memory is taken
    made = Transformer(model, dtype=dtype, device="meta" if is_fsdp else mesh.device)
    add_adapter(made, adapter)
    if recompute:
        recompute_blocks(made.model.layers)
    found: fsdp.FsdpEngine | deepspeed.DeepspeedEngine
    if is_fsdp:
        found = fsdp.FsdpEngine(
            made,
            units=made.model.layers,
            mesh=mesh,
            config=engine,
            update=functools.partial(adamw, config=optim),
            clip=clip,
            is_stock=is_stock,
        )
    else:
        found = deepspeed.DeepspeedEngine(
            made, mesh=mesh, config=engine, optim=optim, clip=clip, may_compile=may_compile
        )
    use_adapter(made, adapter)
    return made, found
