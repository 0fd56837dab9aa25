"""Where the model meets the ranks: the one file that knows both.

units_of          the model's blocks as units of an engine, and which parameters are experts
share_experts     dispatchers that reach the experts of other ranks
put_on_grid       linears and experts whose forward sees weights on a grid
materialize       buffers of a model on the meta device
"""

from __future__ import annotations

import torch
from torch import nn

from ptm.common.errors import RecipeError, line
from ptm.engine.engine import UnitSpec
from ptm.engine.layout import Held, Named
from ptm.mesh.mesh import Mesh
from ptm.model.block import Block
from ptm.model.moe import MixtureOfExperts
from ptm.model.transformer import Transformer
from ptm.parallel.expert import dispatcher_for
from ptm.quant.config import Layers
from ptm.quant.fake_quant import quantize_experts, quantize_linear
from ptm.quant.grid import Grid


def units_of(model: Transformer, held: Held | None = None) -> list[UnitSpec]:
    """The root (embedding, final norm, head) first, then the blocks in the order of the forward.
    held: how frozen experts are, where not as weights."""
    blocks = [(f"model.layers.{i}", block) for i, block in enumerate(model.model.layers)]
    found: dict[str, list[Named]] = {"root": [], **{name: [] for name, _ in blocks}}
    for name, param in model.named_parameters():
        unit = next((block for block, _ in blocks if name.startswith(f"{block}.")), "root")
        found[unit].append(Named.of(name, param, held))
    modules = [("root", model.model.embed_tokens), *blocks]
    return [UnitSpec(name, module, found[name]) for name, module in modules]


def share_experts(model: Transformer, mesh: Mesh, chunks: int) -> None:
    """Have every layer send rows to the ranks of their experts. Raises RecipeError."""
    dispatcher = dispatcher_for(mesh, model.config.num_experts, chunks)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.dispatcher = dispatcher


def put_on_grid(model: Transformer, grid: Grid, layers: Layers) -> None:
    """Train as the export of these layers will be. Raises RecipeError for a group that does not
    divide."""
    for block in model.model.layers:
        assert isinstance(block, Block)
        attention, gate = block.self_attn, block.mlp.gate
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        if layers is Layers.published:
            linears += [m for m in gate.modules() if isinstance(m, nn.Linear)]
        experts = block.mlp.experts
        for inputs in [m.in_features for m in linears] + [experts.w1.shape[2], experts.w2.shape[2]]:
            if grid.group and inputs % grid.group:
                rule = f"must divide the {inputs} inputs of a linear"
                fits = next((g for g in (128, 64, 32, 16) if inputs % g == 0), 0)
                raise RecipeError(line("qat.group", grid.group, rule, f"give {fits}"))
        for linear in linears:
            quantize_linear(linear, grid)
        quantize_experts(experts, grid)


def materialize_buffers(model: nn.Module, device: torch.device) -> None:
    """Give every buffer of a model on the meta device memory, filled with zeros."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(
                    name,
                    torch.zeros_like(buffer, device=device),
                    persistent=name not in module._non_persistent_buffers_set,
                )
