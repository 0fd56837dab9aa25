"""The verb `ptm export`: the text that it needs, its progress, its tables."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ptm.checkpoint import hf_config
from ptm.checkpoint.load_model import module_of
from ptm.checkpoint.open_model import open_model
from ptm.checkpoint.untrusted import read_json
from ptm.common import env
from ptm.common.agent import stop_with_agent
from ptm.common.errors import CheckpointError, PtmError, RecipeError, StorageError, as_typed, line
from ptm.common.units import format_bytes
from ptm.data.config import DataConfig
from ptm.data.corpus import open_corpus
from ptm.data.loader import Rows
from ptm.export import allocate, card, quantize, verify
from ptm.export.config import AS_IS, ExportConfig, ExportFormat, Fp6, Method, VerifyConfig, Width
from ptm.export.crew import Crew
from ptm.export.m32 import M32
from ptm.export.ordinary import OrdinaryWalk
from ptm.export.ordinary_config import is_ordinary
from ptm.export.partial import check_place
from ptm.export.plot import errors_svg
from ptm.export.walk import Walk
from ptm.mesh.mesh import open_mesh
from ptm.mesh.peers import Peers
from ptm.quant.grid import Grid
from ptm.recipe import load_recipe
from ptm.trainer.config import Precision
from ptm.trainer.signals import StopRequest, leaving_at_once
from ptm.verbs import (
    held_out_text,
    open_folder,
    refuse_unwritable,
    text_as_typed,
    tokenizer_of,
    write_json,
)


def export(job: ExportConfig | VerifyConfig) -> None:
    """Quantize a model, and say how well that went; or compare an export with its run."""
    if isinstance(job, VerifyConfig):
        if env.ranks().rank == 0:
            check(job)
        return
    rule, remedy = "stopped, layers that are done are kept", "the same command goes on behind them"
    with leaving_at_once(StopRequest(), rule, remedy):
        stop_with_agent()
        walk, folder = open_walk(job)
        job = settled(job, folder)
        quantize.check_sizes(walk.linears(job.layers), job)  # before anything that takes long
        if job.size is not None:
            _room(job, walk)
        mesh = open_mesh(TIMEOUT_S)
        try:
            crew = Crew(Peers(mesh.background))
            crew.on_main(lambda: check_place(quantize.out_of(job)))
            _export(job, walk, folder, crew)
        finally:
            mesh.close()


def _export(job: ExportConfig, walk: Walk, folder: Path, crew: Crew) -> None:
    is_fitted, rows_of = job.method is Method.gptq, None
    if is_fitted or job.size is not None:
        rows_of = crew.main_first(lambda: _calibration_rows(job, folder, walk))
    total = len(walk.linears(job.layers))
    total += walk.num_layers if is_fitted and walk.num_experts else 0
    console = Console(highlight=False, quiet=not crew.is_main)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        task = progress.add_task("quantizing", total=total)

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=name.removeprefix("model."))

        def choose() -> dict[str, Width]:
            assert rows_of is not None
            return _chosen(job, walk, rows_of, progress)

        text, widths = rows_of if is_fitted else None, None if job.size is None else choose
        out, records = quantize.export(job, walk, text, advance, widths, crew)
    if not crew.is_main:
        return
    print_export(console, out, records)
    if job.size is not None:
        console.print(f"bits of each linear: {out / 'bits.svg'}", soft_wrap=True, markup=False)


SENSITIVITY_ROWS = 16
TIMEOUT_S = 6 * 3600
"""Others wait as long while the first rank measures sensitivities; one that is gone is noticed at
once."""


def _grids(job: ExportConfig, walk: Walk) -> dict[Width, Grid]:
    return {w: quantize.grid_of(job, walk.scale_dtype, w) for w in job.widths}


def _room(job: ExportConfig, walk: Walk) -> int:
    """Bytes that are not linears'. Raises RecipeError where `size` cannot be."""
    assert job.size is not None
    if not isinstance(walk, M32):
        raise RecipeError(line("size", job.size, "measures M32 only", "give bits=4 or bits=8"))
    linears, grids = walk.linears(job.layers), _grids(job, walk)
    every = {name: math.prod(walk.shape(name)) for name in walk.names()}
    rest = 2 * sum(n for name, n in every.items() if name.removesuffix(".weight") not in linears)
    sizes = [allocate.sizes_of(shape, grids, job.format) for shape in linears.values()]
    allocate.check_size(job.size, rest, sizes)
    return rest


def _chosen(
    job: ExportConfig, walk: Walk, rows_of: quantize.RowsOf, progress: Progress
) -> dict[str, Width]:
    """The width of each linear for `size`, measured and shown."""
    assert job.size is not None and isinstance(walk, M32)
    linears, rest, grids = walk.linears(job.layers), _room(job, walk), _grids(job, walk)
    ids, documents = rows_of(SENSITIVITY_ROWS)
    model = module_of(walk.opened, job.run, dtype=torch.bfloat16)
    total = len({*map(allocate.group_of, linears)}) * len({width.bits for width in grids})
    task = progress.add_task("measuring", total=total)

    def advance(name: str) -> None:
        progress.update(task, advance=1, description=name.removeprefix("model."))

    costs = allocate.measure(model, linears, grids, job.format, ids, documents, advance)
    progress.remove_task(task)
    chosen = allocate.fit(job.size, rest, costs)
    used = rest + sum(costs[name].size[width] for name, width in chosen.items())
    shown = Table(title=f"bits / inputs of a scale by kind of linear, {format_bytes(used)} in all")
    plain, columns = Width(4, job.group), (*sorted(grids, key=_breadth), AS_IS)
    for head in ("kind", *map(str, columns), f"KL of all at {plain}", "as chosen"):
        shown.add_column(head, justify="left" if head == "kind" else "right")
    kinds: dict[str, list[str]] = {}
    for name in linears:
        kinds.setdefault(card.kind_of(name), []).append(name)
    for kind, names in kinds.items():
        counts = (str(sum(chosen[n] == width for n in names)) for width in columns)
        before = sum(costs[n].kl[plain] for n in names)
        after = sum(costs[n].kl[chosen[n]] for n in names)
        shown.add_row(kind, *counts, f"{before:.2e}", f"{after:.2e}")
    progress.console.print(shown)
    return chosen


def _breadth(width: Width) -> tuple[int, float]:
    """Larger of what takes more bytes."""
    return width.bits, -(width.group or math.inf)


def settled(job: ExportConfig, folder: Path) -> ExportConfig:
    """The job with `method=auto` resolved; of trained codes the grid is the run's own."""
    recipe_file = recipe_of(folder)
    recipe = None if recipe_file is None else load_recipe([f"recipe={recipe_file}"])
    grid = None if recipe is None else recipe.qat.made()
    if job.method is Method.auto:
        method = Method.gptq if grid is None else Method.trained
        job = dataclasses.replace(job, method=method)
    if job.method is not Method.trained:
        return job
    if recipe is None or grid is None:
        rule = f"{folder} was not trained on a grid"
        raise RecipeError(line("method", "trained", rule, "train with qat.grid=int4 first"))
    if recipe.train.precision is not Precision.bf16:
        raise RecipeError(line("method", "trained", "needs train.precision=bf16", "use nearest"))
    fp6 = None if grid.is_int else Fp6(str(grid.kind).removeprefix("fp6_"))
    is_fp6 = job.format is ExportFormat.fp6
    if is_fp6 != (fp6 is not None):
        rule = f"{folder} was trained on {grid.kind}"
        remedy = "give format=fp6" if fp6 else "give format=gptq"
        raise RecipeError(line("format", job.format, rule, remedy))
    return dataclasses.replace(
        job,
        bits=str(grid.bits),
        group=grid.group,
        symmetric=grid.is_symmetric,
        layers=recipe.qat.layers,
        fp6=fp6 or job.fp6,
    )


def recipe_of(folder: Path) -> Path | None:
    """The recipe of the run that a folder is or belongs to."""
    recipes = (folder / "recipe.yaml", folder.parent.parent / "recipe.yaml")
    return next((path for path in recipes if path.is_file()), None)


def print_export(console: Console, out: Path, records: list[quantize.Record]) -> None:
    """The table of linears by kind, what was starved, and where the export is."""
    shown = Table(title="relative error of outputs on calibration text, mean over linears")
    for head in ("kind", "linears", "error", "nearest"):
        shown.add_column(head, justify="left" if head == "kind" else "right")
    for kind, count, error, nearest in card.table(records):
        shown.add_row(kind, str(count), error, nearest)
    console.print(shown)
    if few := card.starved(records):
        names = ", ".join(r.name.removesuffix(".w1").removeprefix("model.") for r in few[:8])
        console.print(f"{len(few)} experts saw few tokens of their own: {names}", soft_wrap=True)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    console.print(f"{out}: {format_bytes(size)}", soft_wrap=True, markup=False)


def open_walk(job: ExportConfig) -> tuple[Walk, Path]:
    """The model to quantize, and the folder it was looked for in."""
    folder = Path(job.run)
    if (folder / hf_config.FILE).exists() and is_ordinary(read_json(folder, hf_config.FILE)):
        return OrdinaryWalk(folder, job.format), folder
    opened, folder = open_folder(job.run, job.step)
    return M32(opened), folder


def _calibration_rows(job: ExportConfig, folder: Path, walk: Walk) -> quantize.RowsOf:
    recipe_file = recipe_of(folder)
    if recipe_file is None and job.source is None:
        rule = "has no recipe.yaml that says what it was trained on"
        raise CheckpointError(line("run", job.run, rule, "give source=FOLDER of text"))
    data, seq_len = DataConfig(), job.seq_len
    if recipe_file is not None:
        recipe = load_recipe([f"recipe={recipe_file}"])
        data, seq_len = recipe.data, seq_len or recipe.train.seq_len
    if job.source is not None:
        words = {"source": (job.source,), "weights": ()}
        data = dataclasses.replace(data, **words, tokenizer=str(walk.tokenizer))
    seq_len = seq_len or min(2048, walk.max_positions)
    is_foreign = job.source is not None
    with text_as_typed(job):
        corpus = open_corpus(
            data,
            vocab_size=walk.vocab_size,
            seed=job.seed,
            show_progress=True,
            is_all_held_out=is_foreign,
        )
        part = corpus.held_out if is_foreign else corpus.train
        rows = Rows(part, seq_len=seq_len, isolate_documents=walk.isolate_documents)

    def rows_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = rows.batch(0, min(count, rows.num_rows))
        return batch.input_ids, batch.document_ids

    return rows_of


def check(job: VerifyConfig) -> None:
    """Print an export beside its run. Raises PtmError where it is worse than a limit."""
    if job.json:
        refuse_unwritable("json", Path(job.json), is_folder=False)
    reference, folder = open_folder(job.run, job.step)
    exports = {}
    for key, named in (("export", job.export), ("plain", job.plain)):
        if named is not None:
            with as_typed({"folder": key, "run": key}):
                exports[key] = open_model(Path(named))
    models = verify.models_of(reference, exports)
    text = held_out_text(job, Path(job.run), tokenizer_of(reference, folder), models["bf16"])
    corpus, seq_len = text
    with text_as_typed(job):
        isolated = reference.model.isolate_documents
        rows = Rows(corpus.held_out, seq_len=seq_len, isolate_documents=isolated)
    count, size = min(job.rows, rows.num_rows), job.micro_batch_size
    batches = [rows.batch(i, min(i + size, count)) for i in range(0, count, size)]
    found = verify.compare(models, batches)
    whole = rows.batch(0, count)
    layers = verify.layer_errors(reference, exports, whole.input_ids, whole.document_ids, size)
    sizes = {"bf16": verify.size_of(reference)}
    sizes |= {name: verify.size_of(opened) for name, opened in exports.items()}
    console = Console(highlight=False)
    base = found["bf16"]["loss"]
    for name, values in found.items():
        values["loss_percent"] = 100 * (values["loss"] / base - 1)
        errors = [row[name] for row in layers if name in row]
        values["layer_error"] = sum(errors) / len(errors) if errors else 0.0
        values["size_bytes"] = sizes.get(name, sizes["export"])
    console.print(_comparison(found, count, seq_len))
    drawing = Path(job.plot) if job.plot else Path(job.export) / "verify.svg"
    try:
        drawing.write_text(errors_svg(layers, list(exports), card.kind_of))
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise StorageError(line("plot", drawing, rule, "name another file")) from error
    console.print(f"errors by layer: {drawing}", soft_wrap=True, markup=False)
    if job.json:
        write_json(job.json, {"export": job.export, "models": found, "layers": layers})
    _hold(job, found["export"])


def _comparison(found: dict[str, dict[str, float]], rows: int, seq_len: int) -> Table:
    shown = Table(title=f"{rows} rows of {seq_len} held-out tokens")
    heads = "model|size|loss|to bf16|KL|same top token|layer error"
    for head in heads.split("|"):
        shown.add_column(head, justify="left" if head == "model" else "right")
    for name, values in found.items():
        shown.add_row(
            name,
            format_bytes(int(values["size_bytes"])),
            f"{values['loss']:.4f}",
            f"{values['loss_percent']:+.3f} %",
            f"{values['kl']:.2e}",
            f"{values['top1']:.2%}",
            f"{values['layer_error']:.2e}" if values["layer_error"] else "",
        )
    return shown


def _hold(job: VerifyConfig, values: dict[str, float]) -> None:
    for key, limit, value in (
        ("max_loss", job.max_loss, values["loss_percent"]),
        ("max_kl", job.max_kl, values["kl"]),
    ):
        if limit is not None and value > limit:
            rule = f"{job.export} comes to {value:.3g}"
            raise VerifyError(line(key, limit, rule, "use more bits, or more rows of text"))


class VerifyError(PtmError):
    """An export is worse than the limit that was set."""

    exit_code = 1
