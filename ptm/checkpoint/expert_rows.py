"""The codes of an export's experts, as the rows that an engine holds (ptm/quant/rows.py)."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ptm.checkpoint import hf_config
from ptm.checkpoint.hf import Opened, open_hf
from ptm.common.errors import CheckpointError, RecipeError, line
from ptm.quant.grid import GridKind
from ptm.quant.rows import RowFormat

EXPERTS = re.compile(r"(.*\.experts)\.(w[12])")
"""Our name of all experts' matrices in a layer; an export has those of expert e in STEM.e.w1."""


def refuse_other_codes(folder: Path, kind: GridKind) -> None:
    """Raise RecipeError unless the folder is an export with all experts on that grid, in groups and
    without zero points as they are held."""

    def refusal(rule: str, more: str = "") -> RecipeError:
        how = f"{export_words(kind)} {more}".strip()
        remedy = f"make one with `ptm export RUN {how}` and name its folder in train.init_from"
        return RecipeError(line("adapter.base", kind, rule, remedy))

    if not (folder / hf_config.FILE).exists():
        raise refusal(f"needs an export, and {folder} is none")
    opened = open_hf(folder)
    if opened.quantized is None:
        raise refusal(f"needs an export with codes, and {folder} has weights")
    there, model, held = set(opened.quantized.modules), opened.model, RowFormat(kind, 2)
    inputs = {"w1": model.hidden_size, "w2": model.moe_intermediate_size}
    for i in range(model.num_hidden_layers):
        for e in range(model.num_experts):
            for which in ("w1", "w2"):
                module = f"model.layers.{i}.mlp.experts.{e}.{which}"
                if module not in there:
                    raise refusal(f"needs codes of all experts, and {module} has weights")
                grid = opened.quantized.config.grid_of(module)
                if grid.kind is not kind:
                    raise refusal(f"is another grid than the {grid.kind} of {module}")
                if (found := held.refusal(grid, inputs[which])) is not None:
                    raise refusal(f"cannot be held, as {module} {found[0]}", found[1])


def export_words(kind: GridKind) -> str:
    """What `ptm export` is told for that grid."""
    bits = {GridKind.int4: "bits=4", GridKind.int8: "bits=8"}
    return bits.get(kind, f"format=fp6 fp6={str(kind).removeprefix('fp6_')}")


def expert_rows(opened: Opened, name: str, held: RowFormat) -> Tensor:
    """(E x R, row bytes) uint8 of w1 or w2 of a layer's experts. Raises CheckpointError."""
    found = EXPERTS.fullmatch(name)
    assert found is not None and opened.quantized is not None, name
    stem, which = found.groups()
    rows = []
    for e in range(opened.model.num_experts):
        module = f"{stem}.{e}.{which}"
        q, order = opened.quantized.quantized(module)
        try:
            if order is not None:
                raise ValueError("has inputs in another order")
            rows.append(held.encode(q))
        except ValueError as error:
            remedy = "make the export with ptm, or leave adapter.base out"
            rule = f"{error}, and cannot be held as codes"
            raise CheckpointError(line("tensor", module, rule, remedy)) from None
    return torch.cat(rows)
