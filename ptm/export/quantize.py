"""`ptm export`: a model's linears on a grid of few bits, in files that others read.

    1 which rows of text (ptm/export/calibrate.py)
    2 layer by layer: the stages of a walk (ptm/export/walk.py); for each, the Hessian of its
      inputs and GPTQ (ptm/quant/gptq.py); the layer goes on with the quantized weights
    3 each layer into a file of its own, packed (ptm/quant/pack.py), then config.json, tokenizer,
      index and a model card

Ranks share each layer (ptm/export/crew.py), to the same bytes for any number of them, and the first
one writes. Memory holds one layer, its shard and the rows of the text. A kill costs the layer under
way: started again, the same command goes on, to the same bytes. Quantized are q, k, v, o, MLPs and
all experts; norms, filters, embedding and head never, M32's router with layers=published.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptm.checkpoint import hf_config, quant_config
from ptm.checkpoint.hf import INDEX
from ptm.checkpoint.manifest import write_file
from ptm.checkpoint.untrusted import read_json
from ptm.common.errors import DataError, RecipeError, line
from ptm.export.calibrate import Text, choose_rows, share_of
from ptm.export.card import model_card
from ptm.export.config import AS_IS, ExportConfig, ExportFormat, Width
from ptm.export.crew import Crew
from ptm.export.layer import Advance, Layer, Record, format_of
from ptm.export.partial import Partial
from ptm.export.plot import bits_svg
from ptm.export.walk import Walk
from ptm.quant.grid import Grid, GridKind

RowsOf = Callable[[int], tuple[Tensor, Tensor]]
"""`rows_of(n)`: ids and document ids of n rows of calibration text, (n, L) each."""


def grid_of(
    config: ExportConfig, scale_dtype: torch.dtype = torch.float16, width: Width | None = None
) -> Grid:
    """The grid of a linear; width: where it is chosen for each."""
    bits, group = width or (config.width, config.group)
    if config.format is ExportFormat.fp6:
        return Grid(GridKind(f"fp6_{config.fp6}"), group, scale_dtype=scale_dtype)
    kind = GridKind.int4 if bits == 4 else GridKind.int8
    return Grid(kind, group, config.symmetric, scale_dtype)


def out_of(config: ExportConfig) -> Path:
    if config.out is not None:
        return Path(config.out)
    bits = config.width if config.size is None else config.size
    return Path(config.run) / "export" / f"{config.format}-{bits}"


def check_sizes(linears: Mapping[str, tuple[int, int]], config: ExportConfig) -> None:
    """Raise RecipeError where a group or a word does not divide a linear."""
    per_word = 32 // config.width if config.format is ExportFormat.gptq else 1
    for name, (outputs, inputs) in linears.items():
        if config.group and inputs % config.group:
            fits = [g for g in (128, 64, 32, 16) if inputs % g == 0]
            rule = f"must divide the {inputs} inputs of {name}"
            raise RecipeError(line("group", config.group, rule, f"give {fits[0] if fits else 0}"))
        if outputs % per_word or inputs % per_word:
            rule = f"{name} is {outputs} x {inputs}, which {per_word} codes a word do not divide"
            raise RecipeError(line("format", config.format, rule, "give format=compressed-tensors"))


def export(
    config: ExportConfig,
    walk: Walk,
    rows_of: RowsOf | None,
    advance: Advance,
    choose: Callable[[], Mapping[str, Width]] | None = None,
    crew: Crew | None = None,
) -> tuple[Path, list[Record]]:
    """Write the export; `advance` hears of every linear and every layer of the first pass.

    rows_of is None where no text is needed. choose: the width of each linear, asked for once, on
    the first rank; None: the config's. All ranks of a crew call it, and see the same folders.
    Raises CheckpointError, DataError, RecipeError, StorageError, and HangError where a rank is
    gone.
    """
    crew = crew or Crew()
    check_sizes(walk.linears(config.layers), config)
    out = out_of(config)
    partial: Partial = crew.main_first(
        lambda: Partial(out, _settings(config, walk), walk.num_layers + 1)
    )
    widths = None if choose is None else _widths(choose, partial, crew)
    grids = {}
    for name in walk.linears(config.layers):
        width = None if widths is None else widths[name]
        if width == AS_IS:
            advance(name)
        else:
            grids[name] = grid_of(config, walk.scale_dtype, width)
    text = rows = None
    if rows_of is not None:
        text = _text(config, walk, rows_of, partial, advance, crew)
        rows = walk.embed(text) if not partial.num_done else _resumed(partial)
    twin_rows = None
    if rows is not None and config.alpha:  # copies: rows of the next layer are made in their place
        done = partial.num_done
        twin_rows = _resumed(partial, "twin") if done else [x.clone() for x in rows]
    for layer in range(partial.num_done, walk.num_layers):
        made = Layer(config, walk, layer, grids, advance, crew)
        if text is not None and rows is not None:
            rows, twin_rows = made.calibrate(rows, twin_rows, text)
        else:
            made.round()
        packed, found = made.gathered()
        if crew.is_main:
            partial.write_shard(layer + 1, made.tensors(packed))
            kept = {f"rows.{i:05d}": x for i, x in enumerate(rows or ())}
            kept |= {f"twin.{i:05d}": x for i, x in enumerate(twin_rows or ())}
            partial.finish_layer(layer, kept or {"none": torch.zeros(1)}, found)

    def finish() -> list[Record]:
        records = [Record(*values) for values in partial.records()]
        if widths is not None:
            _replace(partial.folder / "bits.svg", bits_svg(widths))
        _finish(config, walk, grids, partial, records)
        return records

    return out, [Record(*values) for values in crew.on_main(finish)]


def _widths(
    choose: Callable[[], Mapping[str, Width]], partial: Partial, crew: Crew
) -> dict[str, Width]:
    """What was chosen is remembered, as it was measured: a second start takes the same."""
    kept = partial.folder / "settings-widths.json"

    def found() -> dict[str, Width]:
        if not kept.exists():
            _replace(kept, json.dumps(choose()))
        return read_json(partial.folder, kept.name)

    return {name: Width(*width) for name, width in crew.on_main(found).items()}


def _text(
    config: ExportConfig,
    walk: Walk,
    rows_of: RowsOf,
    partial: Partial,
    advance: Advance,
    crew: Crew,
) -> Text:
    """The calibration text; which rows is remembered, so that a second start takes the same."""
    kept, has_choice = partial.folder / "settings-rows.json", walk.num_experts > 0
    ids, documents = rows_of(2 * config.rows if has_choice else config.rows)
    chosen = crew.on_main(lambda: json.loads(kept.read_text()) if kept.exists() else None)
    if chosen is None:
        if len(ids) < 1:
            raise DataError(line("rows", config.rows, "there is no row", "give more text"))
        chosen = list(range(len(ids)))
        if has_choice:
            pool = walk.text(ids, documents, config.micro_batch_size)
            counts = walk.routed_rows(pool, lambda: advance("choosing text"), crew)
            tokens = config.rows * ids.shape[1]
            share = share_of(tokens, walk.num_experts, walk.experts_per_token)
            chosen = choose_rows(counts, config.rows, share)
        crew.on_main(lambda: _replace(kept, json.dumps(chosen)))
    return walk.text(ids[chosen], documents[chosen], config.micro_batch_size)


def _resumed(partial: Partial, kind: str = "rows") -> list[Tensor]:
    found = partial.rows()
    return [found[name] for name in sorted(found) if name.startswith(kind)]


def _settings(config: ExportConfig, walk: Walk) -> dict[str, Any]:
    keys = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "run")}
    keys = {
        k: v if isinstance(v, (int, float, bool)) or v is None else str(v) for k, v in keys.items()
    }
    return {**keys, "model": str(walk.folder.resolve())}


def _finish(
    config: ExportConfig,
    walk: Walk,
    chosen: Mapping[str, Grid],
    partial: Partial,
    records: list[Record],
) -> None:
    rest = [name for name in walk.names() if not name.startswith("model.layers.")]
    partial.write_shard(0, {name: walk.read(name).to(walk.dtype) for name in rest})
    for path in partial.folder.glob("settings-*.json"):
        path.unlink()
    where, total = {}, 0
    for index in range(partial.num_files):
        file = partial.file_name(index)
        for name, size in _sizes(partial.folder, file):
            where[name], total = file, total + size
    grids: dict[str, Grid | None] = dict.fromkeys(walk.left(config.layers))
    grids |= {name: chosen.get(name) for name in walk.linears(config.layers)}
    about = {"quantizer": ["ptm"], "damp_percent": config.damping, "rows": config.rows,
             "method": str(config.method), "alpha": config.alpha}  # fmt: skip
    for path in partial.folder.glob("tokenizer*"):
        path.unlink()
    keys = walk.config(partial.folder)
    quantization = quant_config.render(format_of(config), grids, about=about)
    quantization = keys[quant_config.KEY] = walk.quantization(quantization)
    files = {
        hf_config.FILE: keys,
        INDEX: {"metadata": {"total_size": total}, "weight_map": where},
        "generation_config.json": walk.generation_config(),
    }
    if config.format is ExportFormat.gptq:
        files[quant_config.TWIN] = quantization
    for name, values in files.items():
        _replace(partial.folder / name, json.dumps(values, indent=2) + "\n")
    count = sum(math.prod(walk.shape(name)) for name in walk.names())
    card = model_card(config, count, records, total)
    _replace(partial.folder / "README.md", card)
    _replace(partial.folder / "layers.json", json.dumps([r._asdict() for r in records], indent=1))
    partial.finish()


def _sizes(folder: Path, file: str) -> Iterator[tuple[str, int]]:
    from ptm.checkpoint.safetensors_file import SafetensorsFile

    for name, stored in SafetensorsFile(folder, file).tensors.items():
        yield name, stored.num_bytes


def _replace(path: Path, text: str) -> None:
    """Whole once it has its name."""
    begun = path.with_name(f"{path.name}.tmp")
    begun.unlink(missing_ok=True)
    write_file(begun, text.encode())
    os.replace(begun, path)
