"""What the verbs beside train and convert do with their configs (ptm/jobs.py)."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.table import Table

from ptm.bench import decode, engines, experts, gptq, kernels, router, tiers, train, updates, wire
from ptm.build import frozen_copy, hardware_folders, make_plan
from ptm.checkpoint.folders import step_folder
from ptm.checkpoint.hf import Opened
from ptm.checkpoint.load_model import inference_module_of
from ptm.checkpoint.open_model import open_model
from ptm.common import env
from ptm.common.device import best_device
from ptm.common.errors import (
    CheckpointError,
    DataError,
    RecipeError,
    StorageError,
    as_typed,
    line,
)
from ptm.common.units import format_bytes
from ptm.common.values import show
from ptm.data.chat import reason_of
from ptm.data.config import DataConfig
from ptm.data.corpus import Corpus, open_corpus
from ptm.data.sft import chat_template
from ptm.data.sft_config import SftConfig
from ptm.data.tokenizer import Tokenizer, load_tokenizer
from ptm.engine.config import PolicyKind
from ptm.engine.terms import Terms
from ptm.engine.trace import Trace
from ptm.eval.perplexity import held_out
from ptm.export import allocate
from ptm.export.config import AS_IS, BF16, ExportConfig
from ptm.export.m32 import linears_of
from ptm.export.quantize import check_sizes, grid_of
from ptm.export.size import kinds_of
from ptm.jobs import (
    BenchJob,
    DecodeBenchJob,
    EvalJob,
    GenerateJob,
    GptqBenchJob,
    KernelBenchJob,
    PlanExportJob,
    PlanJob,
    ReportJob,
    StepBenchJob,
)
from ptm.mesh.mesh import open_mesh
from ptm.model.transformer import Transformer
from ptm.parts import Batches
from ptm.planner.explain import settle
from ptm.planner.foresight import foresee
from ptm.planner.hardware import counted
from ptm.recipe import Recipe, difference, load_recipe
from ptm.report.html import write_report
from ptm.serve.generator import Sampling, stream_text
from ptm.trainer.config import BY_TOKEN

logger = logging.getLogger(__name__)


class TextJob(Protocol):
    """What says which text to evaluate on."""

    @property
    def source(self) -> str | None: ...
    @property
    def seq_len(self) -> int | None: ...


BENCHES = {"router": router.run, "updates": updates.run}
STEP_BENCHES = {
    "engines": engines.run,
    "experts": experts.run,
    "wire": wire.run,
    "tiers": tiers.run,
    "train": train.run,
}


def plan(job: PlanJob | PlanExportJob) -> None:
    """Print the plan, or leave with code 3; with schedule, when pages move within a step too; of an
    export, its size."""
    if env.ranks().rank != 0:
        return
    if isinstance(job, PlanExportJob):
        show_export(job)
        return
    if job.trace is not None:
        show_schedule(job, *_traced(Path(job.trace)))
        return
    num_ranks = job.ranks or (counted(job.hardware)[0] if job.hardware else None)
    ranks = env.ranks()
    if num_ranks is not None:
        ranks = env.Ranks(0, num_ranks, 0, min(num_ranks, job.ranks_per_machine))
    print(make_plan(job, ranks=ranks, hardware=job.hardware, may_measure=True).text(), end="")
    if job.schedule:
        print()
        wanted, machine = settle(
            job.model,
            job.train,
            job.engine,
            job.checkpoint,
            job.adapter,
            has_log_probs=job.mode in BY_TOKEN,
            frozen_copy=frozen_copy(job),
            ranks=ranks,
            hardware=job.hardware,
            folders=hardware_folders(),
        )
        found = foresee(wanted, machine, job.engine.policy)
        if found.num_shown < found.micro_batches:
            print(f"{found.num_shown} of {found.micro_batches:,} micro-batches, which are alike:\n")
        show_schedule(job, found.trace, found.terms)


def show_export(job: PlanExportJob) -> None:
    """Print the bytes of an export by kind of tensor, beside those in 16 bits; with a size, those
    bits of each linear that are likely to cost least there."""
    model = load_recipe([f"recipe={job.recipe}", f"model.scale={job.scale}"]).model
    is_16 = job.bits == str(BF16) and job.size is None
    given = ExportConfig(
        run="", format=job.format, bits=None if is_16 else job.bits, size=job.size, group=job.group,
        layers=job.layers,
    )  # fmt: skip
    linears = linears_of(model, job.layers)
    check_sizes(linears, given)
    widths = dict.fromkeys(linears, AS_IS) if is_16 else None
    if job.size is not None:
        grids = {w: grid_of(given, width=w) for w in given.widths}
        as_is = dict.fromkeys(linears, AS_IS)
        whole = sum(kind.num_bytes for kind in kinds_of(model, given, as_is))
        rest = whole - sum(2 * outputs * inputs for outputs, inputs in linears.values())
        widths = allocate.fit(job.size, rest, allocate.prior(linears, grids, job.format))
    found = kinds_of(model, given, widths)
    of_each = "4, 8 or 16" if job.size else BF16 if is_16 else given.width
    grid = "" if is_16 else f", symmetric={show(given.symmetric)}"
    shown = Table(title=f"{job.recipe}, scale {job.scale}: {job.format}, {of_each} bits{grid}")
    for head in ("kind", "tensors", "parameters", "bits / inputs of a scale", "size"):
        shown.add_column(head, justify="left" if head == "kind" else "right")
    for kind in found:
        counts = f"{kind.tensors:,}", f"{kind.parameters:,}", str(kind.width)
        shown.add_row(kind.name, *counts, format_bytes(kind.num_bytes))
    total = sum(kind.num_bytes for kind in found)
    numel = sum(kind.parameters for kind in found)
    shown.add_section()
    count = f"{sum(kind.tensors for kind in found):,}"
    shown.add_row("all", count, f"{numel:,}", f"{8 * total / numel:.2f}", format_bytes(total))
    console = Console(highlight=False)
    console.print(shown)
    console.print(f"{total / (2 * numel):.1%} of 16 bits, {format_bytes(2 * numel)}")
    if job.size is not None:
        note = "bits and groups go by kind of linear here; ptm export chooses by measuring each"
        console.print(note, soft_wrap=True)


def _traced(run: Path) -> tuple[Trace, Terms]:
    """The newest traced step of a run, and what it was scheduled with."""
    names = ("trace.json", "terms.json")
    if missing := [name for name in names if not (run / name).is_file()]:
        rule = f"has no {missing[0]}, which a run leaves at its end or stop if its pages moved"
        raise RecipeError(line("trace", run, rule, "name the folder of such a run"))
    return Trace.load(run / names[0]), Terms.load(run / names[1])


def show_schedule(job: PlanJob, trace: Trace, terms: Terms) -> None:
    """Print the schedule, what the other policy would come to, and where the drawing is."""
    if job.frames is not None:
        terms = terms.with_frames(job.frames)
    chosen = terms.schedule(trace)
    print(chosen.text())
    for policy in PolicyKind:
        if policy is not terms.policy:
            print(f"\nbeside it: {terms.with_policy(policy).schedule(trace).headline()}")
    try:
        chosen.svg(Path(job.out))
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise StorageError(line("out", job.out, rule, "name another file")) from error
    print(f"drawn in {job.out}")


def generate(job: GenerateJob) -> None:
    """Stream a continuation of the prompt, or the answer to a question, to stdout."""
    if job.prompt and job.question:
        raise RecipeError(line("question", job.question, "excludes prompt", "give one of them"))
    opened, folder = open_folder(job.run, job.step, may_have_soft=True)
    tokenizer = load_tokenizer(tokenizer_of(opened, folder))
    model = inference_module_of(opened, folder).to(best_device())
    ids = _asked(job, tokenizer, tokenizer_of(opened, folder)) if job.question else ()
    sampling = Sampling(job.prompt, ids, job.max_new_tokens, job.temperature, job.top_p, job.seed)
    for text in stream_text(model, tokenizer, sampling):
        print(text, end="", flush=True)
    print()


def _asked(job: GenerateJob, tokenizer: Tokenizer, beside: Path) -> tuple[int, ...]:
    """The question as the run was trained on questions, else as its tokenizer's files say."""
    recipe = _recipe_of(Path(job.run))
    sft = SftConfig() if recipe is None else recipe.sft
    with chat_template(sft, tokenizer, beside) as template:
        message = {"role": "user", "content": job.question}
        try:
            return tuple(template.encode_prompt([message], tokenizer))
        except DataError as error:
            rule, _, remedy = reason_of(error).rpartition("; ")
            raise RecipeError(line("question", job.question, rule, remedy)) from None


def _recipe_of(run: Path) -> Recipe | None:
    """Of a run, or of one of its checkpoints."""
    files = (run / "recipe.yaml", run.parent.parent / "recipe.yaml")
    file = next((path for path in files if path.is_file()), None)
    return None if file is None else load_recipe([f"recipe={file}"])


def evaluate(job: EvalJob) -> None:
    """Print held-out loss, perplexity and bits per byte of a model; every rank takes part."""
    if job.json and env.ranks().rank == 0:
        refuse_unwritable("json", Path(job.json), is_folder=False)
    opened, folder = open_folder(job.run, job.step, may_have_soft=True)
    mesh = open_mesh(600)
    model = inference_module_of(opened, folder).to(mesh.device)
    corpus, seq_len = held_out_text(job, Path(job.run), tokenizer_of(opened, folder), model)
    with text_as_typed(job):
        batches = Batches(
            corpus.held_out,
            mesh,
            seq_len=seq_len,
            isolate_documents=model.config.isolate_documents,
            num_rows=job.rows,
            micro_batch_size=job.micro_batch_size,
            num_soft=len(model.soft_ids),
        )
    token_bytes = torch.as_tensor(corpus.tokenizer.token_bytes(), device=mesh.device)
    found = held_out(model, batches.micro_batches(0), token_bytes=token_bytes, mesh=mesh)
    if mesh.is_main:
        print(f"{'model':16} {opened.folder}")
        for name, value in found.items():
            print(f"{name.removeprefix('eval_'):16} {value:,.4f}")
        if job.json:
            write_json(job.json, {"run": job.run, "model": str(opened.folder), **found})
    mesh.close()


def held_out_text(
    job: TextJob, run: Path, tokenizer: Path, model: Transformer
) -> tuple[Corpus, int]:
    """The text to evaluate on: what the job names, else what the run held out."""
    recipe = _recipe_of(run)
    if recipe is None and job.source is None:
        rule = "has no recipe.yaml that says what text was held out"
        raise CheckpointError(line("run", run, rule, "give source=FOLDER of text"))
    seq_len = job.seq_len
    if recipe is not None:
        data, seq_len = recipe.data, seq_len or recipe.train.seq_len
    else:
        data = DataConfig()
    is_whole = job.source is not None
    if job.source is not None:
        data = dataclasses.replace(data, source=(job.source,), weights=(), tokenizer=str(tokenizer))
    longest = model.config.max_position_embeddings
    seq_len = seq_len or min(4096, longest)
    if seq_len > longest and env.ranks().rank == 0:
        rule = f"passes max_position_embeddings={longest}, the longest that the model was made for"
        logger.warning(line("seq_len", seq_len, rule, "lower it, or expect a worse loss"))
    with text_as_typed(job):
        corpus = open_corpus(
            data,
            vocab_size=model.config.vocab_size,
            seed=0,
            is_builder=env.ranks().rank == 0,
            show_progress=env.ranks().rank == 0,
            is_all_held_out=is_whole,
        )
    return corpus, seq_len


def text_as_typed(job: TextJob) -> AbstractContextManager[None]:
    """Errors of the text inside name the job's keys, but for a source that is the run's."""
    source = {} if job.source is None else {"data.source": "source"}
    return as_typed({"train.seq_len": "seq_len", **source})


def report(job: ReportJob) -> None:
    """Write the page and say where it is."""
    run = Path(job.run)
    if not any((run / name).exists() for name in ("metrics.jsonl", "recipe.yaml")):
        remedy = "name a run folder, as in runs/m32-mini"
        raise RecipeError(line("run", job.run, "is not the folder of a run", remedy))
    print(write_report(Path(job.run), out=job.out))


def bench(job: BenchJob | StepBenchJob | KernelBenchJob | DecodeBenchJob | GptqBenchJob) -> None:
    """Run one benchmark and print its table."""
    if isinstance(job, StepBenchJob) and job.bench not in STEP_BENCHES:
        rule = f"must be one of {', '.join(STEP_BENCHES)}"
        raise RecipeError(line("bench", job.bench, rule, "as in `ptm bench engines`"))
    if isinstance(job, BenchJob) and job.name not in BENCHES:
        rule = f"must be one of {', '.join([*BENCHES, *STEP_BENCHES, 'kernels', 'decode', 'gptq'])}"
        raise RecipeError(line("name", job.name, rule, "as in `ptm bench router`"))
    for key in ("out", "json", "svg"):
        if path := getattr(job, key, None):
            refuse_unwritable(key, Path(path), is_folder=key == "out")
    if isinstance(job, GptqBenchJob):
        gptq.run(job)
    elif isinstance(job, DecodeBenchJob):
        decode.run(job)
    elif isinstance(job, KernelBenchJob):
        kernels.run(job)
    elif isinstance(job, StepBenchJob):
        STEP_BENCHES[job.bench](job, recipe_words(job))
    else:
        BENCHES[job.name](job)


def refuse_unwritable(key: str, path: Path, *, is_folder: bool) -> None:
    """Raise StorageError where a long job could not leave its file or folder; a new file is not
    left."""
    try:
        if is_folder:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        elif path.exists():
            path.open("a").close()
        else:
            path.touch()
            path.unlink()
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise StorageError(line(key, path, rule, "name another")) from error


def recipe_words(job: StepBenchJob) -> tuple[str, ...]:
    """Words that make the recipe within `job`, for other processes."""
    changed = difference(job)
    named = (f"recipe={job.recipe}", f"model.scale={job.model.scale}")
    return (*named, *(f"{key}={show(here)}" for key, (_, here) in changed.items()))


def open_folder(run: str, step: int | None, *, may_have_soft: bool = False) -> tuple[Opened, Path]:
    """What is in a folder, said on stderr where it is not what was asked for."""
    folder = model_folder(run, step)
    with as_typed({"folder": "run"}):
        opened = open_model(folder, may_have_soft=may_have_soft)
    if env.ranks().rank == 0:
        for note in opened.notes:
            print(note, file=sys.stderr)
    return opened, folder


def tokenizer_of(opened: Opened, folder: Path) -> Path:
    files = [*opened.tokenizer.glob("tokenizer.json"), *opened.tokenizer.glob("*.model")]
    if not files:
        remedy = "put its tokenizer.json or tokenizer.model there"
        raise CheckpointError(line("run", folder, "has no tokenizer", remedy))
    return opened.tokenizer


def model_folder(run: str, step: int | None) -> Path:
    """The folder to open: the run itself, or one of its steps."""
    if step is None:
        return Path(run)
    folder = step_folder(Path(run) / "checkpoints", step)
    if not folder.is_dir():
        remedy = "leave it out for the newest"
        raise CheckpointError(line("step", step, f"{folder} is not there", remedy))
    return folder


def write_json(path: str, values: dict[str, object]) -> None:
    try:
        Path(path).write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise StorageError(line("json", path, rule, "name another file")) from error
