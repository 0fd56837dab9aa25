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
from ptm.model.config import RopeMode
from ptm.model.transformer import Transformer

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
    opened = open_model(Path(folder))
    for note in opened.notes:
        logger.warning(note)
    return module_of(opened, folder, rope, dtype)


def module_of(
    opened: Opened,
    folder: Path | str,
    rope: str | None = None,
    dtype: torch.dtype | None = None,
) -> Transformer:
    """`load_model` of a folder that is open already."""
    config = opened.model
    if rope is not None:
        config = dataclasses.replace(config, rope_mode=RopeMode(rope))
    weights = opened.weights
    if dtype is None:
        for name in weights.names():
            kind = weights.info(name).dtype
            dtype = kind if dtype is None else torch.promote_types(dtype, kind)
    wanted = Transformer(config, device=torch.device("meta")).state_dict()
    check_shapes(weights, {name: tuple(t.shape) for name, t in wanted.items()}, folder)
    model = Transformer(config, dtype=dtype or torch.float32)
    for name, tensor in model.state_dict().items():
        _fill(tensor.view(-1), stream(weights, all_rows(weights, name)))
    return model.eval()


def _fill(flat: Tensor, pieces: Iterable[Tensor]) -> None:
    position = 0
    for piece in pieces:
        flat[position : position + piece.numel()].copy_(piece.view(-1))
        position += piece.numel()
