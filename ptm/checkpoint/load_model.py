"""`load_model`: a published folder, a run or one of its checkpoints as a module ready to call.

A Transformer is filled tensor by tensor, in pieces of 64 MiB or one expert's matrix, so the peak is
the model and one piece. Nothing of the model's size is allocated before every name and shape is
known to fit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ptm.checkpoint.hf import Opened
from ptm.checkpoint.open_model import open_model
from ptm.checkpoint.source import all_rows, check_shapes, stream
from ptm.common.errors import RecipeError, line
from ptm.model.adapter import add_adapter
from ptm.model.block import Block
from ptm.model.config import ModelConfig, RopeMode
from ptm.model.transformer import Transformer
from ptm.quant.modules import QuantExperts, QuantLinear, Weight, packed

logger = logging.getLogger(__name__)


def load_model(
    folder: Path | str, rope: str | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """The model in a folder, on the CPU, in eval mode.

    `rope` is hf_bf16, megatron or fp32; None is the mode that the weights were trained with:
    megatron for published ones, the recipe's for a run. `dtype` None is that of the stored weights.
    Raises: CheckpointError; RecipeError for an unknown `rope`.
    """
    if rope is not None and rope not in list(RopeMode):
        raise RecipeError(line("rope", rope, f"must be one of {', '.join(RopeMode)}", "choose one"))
    opened = open_model(Path(folder), may_have_soft=True)
    for note in opened.notes:
        logger.warning(note)
    return module_of(opened, folder, rope, dtype)


def module_of(
    opened: Opened,
    folder: Path | str,
    rope: str | None = None,
    dtype: torch.dtype | None = None,
) -> Transformer:
    """`load_model` of a folder that is open already; an export's codes are dequantized."""
    config = _with_rope(opened.model, rope)
    weights = opened.weights
    if dtype is None:
        for name in weights.names():
            kind = weights.info(name).dtype
            dtype = kind if dtype is None else torch.promote_types(dtype, kind)
    made = Transformer(config, device=torch.device("meta"))
    add_adapter(made, opened.beside)
    wanted = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    check_shapes(weights, wanted, folder)
    model = Transformer(config, dtype=dtype or torch.float32)
    add_adapter(model, opened.beside)
    for name, tensor in model.state_dict().items():
        _fill(tensor.view(-1), stream(weights, all_rows(weights, name)))
    return model.eval()


def _fill(flat: Tensor, pieces: Iterable[Tensor]) -> None:
    position = 0
    for piece in pieces:
        flat[position : position + piece.numel()].copy_(piece.view(-1))
        position += piece.numel()


def quantized_module_of(opened: Opened, folder: Path | str, rope: str | None = None) -> Transformer:
    """An export as a module that multiplies its packed codes; the rest in bf16. For inference."""
    source = opened.quantized
    assert source is not None, folder
    config, weights = _with_rope(opened.model, rope), opened.weights
    model = Transformer(config, dtype=torch.bfloat16, device=torch.device("meta"))
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    check_shapes(weights, wanted, folder)
    quantized = set(source.modules)

    def weight_of(module: str) -> Weight:
        if module in quantized:
            return packed(*source.quantized(module))
        return source.read(f"{module}.weight").bfloat16()

    for i, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        prefix = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            if (module := f"{prefix}.self_attn.{name}") in quantized:
                setattr(block.self_attn, name, QuantLinear(weight_of(module)))
        stems = [f"{prefix}.mlp.experts.{e}" for e in range(config.num_experts)]
        if any(f"{stem}.{w}" in quantized for stem in stems for w in ("w1", "w2")):
            sides = ([weight_of(f"{stem}.{w}") for stem in stems] for w in ("w1", "w2"))
            experts = QuantExperts(*sides)
            block.mlp.dispatcher = experts
            block.mlp.experts = experts  # type: ignore[assignment]
    for name, parameter in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        filled = torch.empty(parameter.shape, dtype=parameter.dtype)
        _fill(filled.view(-1), stream(weights, all_rows(weights, name)))
        made = torch.nn.Parameter(filled, requires_grad=False)
        setattr(model.get_submodule(owner), attribute, made)
    for name, buffer in list(model.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        is_kept = attribute not in model.get_submodule(owner)._non_persistent_buffers_set
        zeros = torch.zeros_like(buffer, device="cpu")
        model.get_submodule(owner).register_buffer(attribute, zeros, persistent=is_kept)
    return model.eval()


def inference_module_of(opened: Opened, folder: Path | str, rope: str | None = None) -> Transformer:
    """What `ptm generate` and `ptm eval` run: an export on its codes, any other as stored."""
    make = module_of if opened.quantized is None else quantized_module_of
    return make(opened, folder, rope)


def _with_rope(config: ModelConfig, rope: str | None) -> ModelConfig:
    return config if rope is None else dataclasses.replace(config, rope_mode=RopeMode(rope))
