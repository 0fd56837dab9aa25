"""`ptm export`: a model's linears on a grid of few bits, in files that others read.

    1 which rows of text (ptm/export/calibrate.py)
    2 layer by layer: stages (ptm/export/stages.py); for each, the Hessian of its inputs and GPTQ
      (ptm/quant/gptq.py); the layer goes on with the quantized weights
    3 each layer into a file of its own, packed (ptm/quant/pack.py), then config.json, tokenizer,
      index and a model card

Memory holds one layer, its shard and the rows of the text. A kill costs the layer under way:
started again, the same command goes on, to the same bytes. Quantized are q, k, v, o and all
experts; norms, filters, embedding and head never, the router with layers=published.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptm.checkpoint import hf_config, quant_config
from ptm.checkpoint.hf import INDEX, Opened, copy_tokenizer
from ptm.checkpoint.manifest import write_file
from ptm.checkpoint.source import RowsSource
from ptm.common.errors import CheckpointError, DataError, RecipeError, line
from ptm.engine.split import split
from ptm.export.calibrate import (
    Text,
    choose_rows,
    embed,
    load_block,
    make_text,
    routed_rows,
    share_of,
)
from ptm.export.card import model_card
from ptm.export.config import ExportConfig, ExportFormat, Method
from ptm.export.convert import finish_tokenizer
from ptm.export.partial import Partial
from ptm.export.stages import Stage, Twin, stages
from ptm.model.config import ModelConfig
from ptm.model.hf_names import Layout, Rows, published
from ptm.quant.config import Layers
from ptm.quant.gptq import GptqOptions, Hessian, factorize, relative_error, solve
from ptm.quant.grid import Grid, GridKind, Quantized, round_to_nearest
from ptm.quant.pack import Format, to_tensors

Advance = Callable[[str], None]
RowsOf = Callable[[int], tuple[Tensor, Tensor]]
"""`rows_of(n)`: ids and document ids of n rows of calibration text, (n, L) each."""


class Record(NamedTuple):
    """What was found of one linear. rows: that its codes were fitted to; own: of an expert, those
    that it was chosen for; error: relative, of its outputs on calibration text."""

    name: str
    bits: int
    group: int
    error: float | None
    nearest: float | None
    rows: int
    own: int | None
    damping: float | None


def grid_of(config: ExportConfig) -> Grid:
    if config.format is ExportFormat.fp6:
        return Grid(GridKind(f"fp6_{config.fp6}"), config.group)
    kind = GridKind.int4 if config.width == 4 else GridKind.int8
    return Grid(kind, config.group, config.symmetric)


def out_of(config: ExportConfig) -> Path:
    if config.out is not None:
        return Path(config.out)
    return Path(config.run) / "export" / f"{config.format}-{config.width}"


def working_weight(master: Tensor) -> Tensor:
    """What the paged engine's forward has of an fp32 master in bf16: its upper half."""
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    rest = torch.empty_like(master, dtype=torch.int16)
    split(master.clone(), weight, rest)
    return weight.float()


def is_quantized(name: str, layers: Layers) -> bool:
    """Whether a linear of a layer is, by its name there."""
    return not name.startswith("mlp.gate") or layers is Layers.published


def linears_of(model: ModelConfig, layers: Layers) -> dict[str, tuple[int, int]]:
    """Every linear to quantize, by its published name, and its shape (N, K)."""
    found = {}
    for name, rows in published(model, Layout.hf, tied_copy=False).items():
        head, _, inner = name.removesuffix(".weight").partition("model.layers.")
        inner = inner.partition(".")[2]
        is_linear = "_proj" in inner or ".experts." in inner or inner.startswith("mlp.gate.")
        if not head and is_linear and is_quantized(inner, layers):
            found[name.removesuffix(".weight")] = (rows.shape[0], rows.shape[1])
    return found


def check_sizes(model: ModelConfig, config: ExportConfig) -> None:
    """Raise RecipeError where a group or a word does not divide a linear."""
    per_word = 32 // config.width if config.format is ExportFormat.gptq else 1
    for name, (outputs, inputs) in linears_of(model, config.layers).items():
        if config.group and inputs % config.group:
            fits = [g for g in (128, 64, 32, 16) if inputs % g == 0]
            rule = f"must divide the {inputs} inputs of {name}"
            raise RecipeError(line("group", config.group, rule, f"give {fits[0] if fits else 0}"))
        if outputs % per_word or inputs % per_word:
            rule = f"{name} is {outputs} x {inputs}, which {per_word} codes a word do not divide"
            raise RecipeError(line("format", config.format, rule, "give format=compressed-tensors"))


def export(
    config: ExportConfig, opened: Opened, rows_of: RowsOf | None, advance: Advance
) -> tuple[Path, list[Record]]:
    """Write the export; `advance` hears of every linear and every layer of the first pass.

    rows_of is None where no text is needed. Raises CheckpointError, DataError, RecipeError,
    StorageError.
    """
    model = opened.model
    check_sizes(model, config)
    layout = published(model, Layout.hf, tied_copy=False)
    source = RowsSource(opened.weights, layout)
    out, num_layers = out_of(config), model.num_hidden_layers
    partial = Partial(out, _settings(config, opened), num_layers + 1)
    dtype = torch.bfloat16
    text = rows = None
    if rows_of is not None:
        text = _text(config, model, opened, rows_of, partial, advance, dtype)
        rows = embed(opened.weights, text, dtype) if not partial.num_done else _resumed(partial)
    twin_rows = list(rows) if rows is not None and config.alpha else None
    if partial.num_done and twin_rows is not None:
        twin_rows = _resumed(partial, "twin")
    for layer in range(partial.num_done, num_layers):
        made = _Layer(config, opened, source, layer, advance)
        if text is not None and rows is not None:
            rows, twin_rows = made.calibrate(rows, twin_rows, text, dtype)
        else:
            made.round()
        partial.write_shard(layer + 1, made.tensors(layout, dtype))
        kept = {f"rows.{i:05d}": x for i, x in enumerate(rows or ())}
        kept |= {f"twin.{i:05d}": x for i, x in enumerate(twin_rows or ())}
        partial.finish_layer(layer, kept or {"none": torch.zeros(1)}, made.records)
    records = [Record(*values) for values in partial.records()]
    _finish(config, opened, source, layout, partial, records)
    return out, records


class _Layer:
    """One layer: its codes as they are found."""

    def __init__(
        self, config: ExportConfig, opened: Opened, source: RowsSource, index: int, advance: Advance
    ) -> None:
        self.config, self.opened, self.source = config, opened, source
        self.index, self.advance = index, advance
        self.prefix = f"model.layers.{index}."
        self.grid = grid_of(config)
        self.codes: dict[str, Quantized] = {}
        self.records: list[Record] = []
        self.options = GptqOptions(
            damping=config.damping,
            candidates=config.candidates,
            descents=config.descents,
            alpha=config.alpha,
        )

    def round(self) -> None:
        """Without text: every linear to the nearest codes, of the weights that forwards saw."""
        is_trained = self.config.method is Method.trained
        for name in linears_of(self.opened.model, self.config.layers):
            if name.startswith(self.prefix):
                weight = self._weight(name)
                weight = working_weight(weight) if is_trained else weight
                self._keep(name, round_to_nearest(weight, self.grid), None, 0, None)

    def calibrate(
        self,
        rows: list[Tensor],
        twin_rows: list[Tensor] | None,
        text: Text,
        dtype: torch.dtype,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Quantize by what the inputs are; the rows of the next layer."""
        model, weights = self.opened.model, self.opened.weights
        block = load_block(model, weights, self.index, dtype)
        twin = None
        if twin_rows is not None:
            twin = Twin(load_block(model, weights, self.index, dtype), twin_rows)
        share = share_of(model, text.num_tokens)
        walk = stages(block, rows, text.contexts, twin=twin, least_rows=share)
        try:
            while True:
                self._stage(next(walk))
        except StopIteration as stop:
            return stop.value.rows, stop.value.twin_rows

    def _stage(self, stage: Stage) -> None:
        wanted = {n: w for n, w in stage.linears.items() if is_quantized(n, self.config.layers)}
        if not wanted:
            return
        num_inputs = next(iter(wanted.values())).shape[1]
        hessian = Hessian(num_inputs)
        for x in stage.inputs:
            hessian.add(x)
        try:
            factor = factorize(hessian.mean(), self.options)
        except ValueError as error:
            name = self.prefix + next(iter(wanted))
            raise CheckpointError(line("linear", name, f"{error}", "look at the model")) from None
        cross = _cross(stage, num_inputs)
        for name, parameter in wanted.items():
            whole = self.prefix + name
            weight = self._weight(whole)
            solved = solve(weight, factor, self.grid, self.options, cross_KK=cross)
            parameter.copy_(solved.quantized.dequantize())
            nearest = round_to_nearest(weight, self.grid).dequantize()
            before = relative_error(weight, nearest, factor.mean_KK)
            damping = None if solved.damping == self.options.damping else solved.damping
            found = (solved.error, before)
            self._keep(whole, solved.quantized, found, hessian.num_rows, stage.own_rows, damping)

    def _weight(self, name: str) -> Tensor:
        return self.source.read(f"{name}.weight").float()

    def _keep(
        self,
        name: str,
        codes: Quantized,
        errors: tuple[float, float] | None,
        rows: int,
        own: int | None,
        damping: float | None = None,
    ) -> None:
        self.codes[name] = codes
        error, nearest = errors or (None, None)
        made = Record(name, self.grid.bits, self.grid.group, error, nearest, rows, own, damping)
        self.records.append(made)
        self.advance(name)

    def tensors(self, layout: dict[str, Rows], dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors of the layer as the file has them."""
        found: dict[str, Tensor] = {}
        for name in layout:
            if name.startswith(self.prefix):
                module = name.removesuffix(".weight")
                if module in self.codes:
                    packed = to_tensors(self.codes[module], Format(self.config.format))
                    found |= {f"{module}.{suffix}": t for suffix, t in packed.items()}
                else:
                    found[name] = self.source.read(name).to(dtype)
        return found


def _cross(stage: Stage, num_inputs: int) -> Tensor | None:
    """Mean of (wanted - input) input^T, for GPTAQ."""
    if stage.wanted is None:
        return None
    total, count = torch.zeros(num_inputs, num_inputs), 0
    for x, y in zip(stage.inputs, stage.wanted):
        x, y = (rows.reshape(-1, num_inputs).float() for rows in (x, y))
        total += (y - x).t() @ x
        count += len(x)
    return total / max(count, 1)


def _text(
    config: ExportConfig,
    model: ModelConfig,
    opened: Opened,
    rows_of: RowsOf,
    partial: Partial,
    advance: Advance,
    dtype: torch.dtype,
) -> Text:
    """The calibration text; which rows is remembered, so that a second start takes the same."""
    kept = partial.folder / "settings-rows.json"
    ids, documents = rows_of(2 * config.rows)
    if kept.exists():
        chosen = json.loads(kept.read_text())
    else:
        if len(ids) < 1:
            raise DataError(line("rows", config.rows, "there is no row", "give more text"))
        pool = make_text(model, ids, documents, config.micro_batch_size)
        counts = routed_rows(model, opened.weights, pool, dtype, lambda: advance("choosing text"))
        share = share_of(model, config.rows * ids.shape[1])
        chosen = choose_rows(counts, config.rows, share)
        write_file(kept, json.dumps(chosen).encode())
    return make_text(model, ids[chosen], documents[chosen], config.micro_batch_size)


def _resumed(partial: Partial, kind: str = "rows") -> list[Tensor]:
    found = partial.rows()
    return [found[name] for name in sorted(found) if name.startswith(kind)]


def _settings(config: ExportConfig, opened: Opened) -> dict[str, Any]:
    keys = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "run")}
    keys = {
        k: v if isinstance(v, (int, float, bool)) or v is None else str(v) for k, v in keys.items()
    }
    return {**keys, "model": str(opened.folder.resolve())}


def _finish(
    config: ExportConfig,
    opened: Opened,
    source: RowsSource,
    layout: dict[str, Rows],
    partial: Partial,
    records: list[Record],
) -> None:
    dtype = torch.bfloat16
    rest = [name for name in layout if not name.startswith("model.layers.")]
    partial.write_shard(0, {name: source.read(name).to(dtype) for name in rest})
    (partial.folder / "settings-rows.json").unlink(missing_ok=True)
    where, total = {}, 0
    for index in range(partial.num_files):
        file = partial.file_name(index)
        for name, size in _sizes(partial.folder, file):
            where[name], total = file, total + size
    grids = _grids(opened.model, config)
    about = {"quantizer": ["ptm"], "damp_percent": config.damping, "rows": config.rows,
             "method": str(config.method), "alpha": config.alpha}  # fmt: skip
    for path in partial.folder.glob("tokenizer*"):
        path.unlink()
    ids = finish_tokenizer(opened, partial.folder)
    copy_tokenizer(opened.tokenizer, partial.folder)
    keys = hf_config.render(opened.model, opened.origin.config if opened.origin else None, **ids)
    keys = hf_config.with_dtype(keys, dtype)
    quantization = quant_config.render(Format(config.format), grids, about=about)
    keys[quant_config.KEY] = quantization
    files = {
        hf_config.FILE: keys,
        INDEX: {"metadata": {"total_size": total}, "weight_map": where},
        "generation_config.json": {"do_sample": False},
    }
    if config.format is ExportFormat.gptq:
        files["quantize_config.json"] = quantization
    for name, values in files.items():
        _replace(partial.folder / name, json.dumps(values, indent=2) + "\n")
    card = model_card(config, opened.model, records, total)
    _replace(partial.folder / "README.md", card)
    _replace(partial.folder / "layers.json", json.dumps([r._asdict() for r in records], indent=1))
    partial.finish()


def _grids(model: ModelConfig, config: ExportConfig) -> dict[str, Grid | None]:
    """Of every linear that a reader may think quantized."""
    chosen = linears_of(model, config.layers)
    every = linears_of(model, Layers.published)
    return {name: grid_of(config) if name in chosen else None for name in every}


def _sizes(folder: Path, file: str) -> Iterator[tuple[str, int]]:
    from ptm.checkpoint.safetensors_file import SafetensorsFile

    for name, stored in SafetensorsFile(folder, file).tensors.items():
        yield name, stored.num_bytes


def _replace(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    write_file(path, text.encode())
