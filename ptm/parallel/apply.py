"""Where the model meets the ranks: the one file that knows both.

units_of          the model's blocks as units of an engine, and which parameters are experts
share_experts     dispatchers that reach the experts of other ranks
materialize       buffers of a model on the meta device
"""

from __future__ import annotations

import torch
from torch import nn

from ptm.engine.engine import UnitSpec
from ptm.engine.layout import Named
from ptm.mesh.mesh import Mesh
from ptm.model.moe import MixtureOfExperts
from ptm.model.transformer import Transformer
from ptm.parallel.expert import dispatcher_for


def units_of(model: Transformer) -> list[UnitSpec]:
    """The root (embedding, final norm, head) first, then the blocks in the order of the forward."""
    blocks = [(f"model.layers.{i}", block) for i, block in enumerate(model.model.layers)]
    found: dict[str, list[Named]] = {"root": [], **{name: [] for name, _ in blocks}}
    for name, param in model.named_parameters():
        unit = next((block for block, _ in blocks if name.startswith(f"{block}.")), "root")
        found[unit].append(Named(name, tuple(param.shape), ".experts." in name))
    modules = [("root", model.model.embed_tokens), *blocks]
    return [UnitSpec(name, module, found[name]) for name, module in modules]


def share_experts(model: Transformer, mesh: Mesh, chunks: int) -> None:
    """Have every layer send rows to the ranks of their experts. Raises RecipeError."""
    dispatcher = dispatcher_for(mesh, model.config.num_experts, chunks)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.dispatcher = dispatcher


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
