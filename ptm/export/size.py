"""`ptm plan export`: what an export of a recipe's model comes to, by kind of tensor, without one.

Every tensor of the published format is counted with its scales, zero points and group indices, as
ptm/quant/pack.py stores them; compared with files in tests/export/test_size.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ptm.export.card import kind_of
from ptm.export.config import AS_IS, ExportConfig, ExportFormat, Width
from ptm.export.m32 import linears_of
from ptm.export.quantize import grid_of
from ptm.model.config import ModelConfig
from ptm.model.hf_names import Layout, published
from ptm.quant.grid import Grid
from ptm.quant.pack import SLAB_COLUMNS, SLAB_ROWS

BYTES_16 = 2


class Kind(NamedTuple):
    """Tensors of one kind, stored alike."""

    name: str
    tensors: int
    parameters: int
    width: Width
    num_bytes: int


def stored_bytes(N: int, K: int, grid: Grid, format: ExportFormat) -> int:
    """Of one linear (N, K), all its tensors."""
    G, per_word = grid.num_groups(K), 32 // grid.bits
    scales = G * N * grid.scale_dtype.itemsize
    if format is ExportFormat.fp6:
        slabs = -(-N // SLAB_ROWS) * -(-K // SLAB_COLUMNS)
        return slabs * SLAB_ROWS * SLAB_COLUMNS * 6 // 8 + scales + 2 * 8
    if format is ExportFormat.compressed_tensors:
        zeros = 0 if grid.is_symmetric else 4 * -(-N // per_word) * G
        return 4 * N * -(-K // per_word) + scales + 2 * 8 + zeros
    return 4 * (K // per_word) * N + 4 * G * (N // per_word) + scales + 4 * K


def kinds_of(
    model: ModelConfig, config: ExportConfig, widths: Mapping[str, Width] | None = None
) -> list[Kind]:
    """The tensors of an export in the order of the model, those of a kind and a width added up.
    widths: of each linear; None: the config's."""
    chosen = linears_of(model, config.layers)
    found: dict[tuple[str, Width], Kind] = {}
    for name, rows in published(model, Layout.hf, tied_copy=False).items():
        module, numel = name.removesuffix(".weight"), math.prod(rows.shape)
        width, size = AS_IS, BYTES_16 * numel
        wanted = None if widths is None else widths.get(module)
        if module in chosen and wanted != AS_IS:
            grid = grid_of(config, width=wanted)
            width = Width(grid.bits, grid.group)
            size = stored_bytes(*chosen[module], grid, config.format)
        kind = _kind(module)
        before = found.get((kind, width), Kind(kind, 0, 0, width, 0))
        found[kind, width] = Kind(
            kind, before.tensors + 1, before.parameters + numel, width, before.num_bytes + size
        )
    return list(found.values())


def _kind(module: str) -> str:
    if "layernorm" in module or module.endswith("norm"):
        return "norms"
    if ".lf_gate." in module:
        return "filters"
    return kind_of(module) if ".layers." in module else module.removeprefix("model.")
