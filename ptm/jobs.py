"""What the verbs other than train and plan can be told; ptm/cli.py parses these, ptm/build.py does
the work."""

from __future__ import annotations

from dataclasses import field

from ptm.common.config import Choice, config, ranged
from ptm.data.config import DataAction
from ptm.export.config import ExportFormat
from ptm.quant.config import Layers
from ptm.recipe import Recipe, Scale


@config
class EvalJob:
    run: str
    "Run folder, one of its checkpoints, or a published model folder."
    step: int | None = ranged(None, least=0)
    "Step of the checkpoint; null is the newest good one."
    source: str | None = None
    "Text to evaluate on, all of it, as in data.source; null is what the run held out."
    rows: int = ranged(256, least=1)
    "Rows of seq_len tokens; all if there are fewer."
    seq_len: int | None = ranged(None, least=2, most=2**20)
    "Tokens in a row; null is the run's train.seq_len."
    micro_batch_size: int = ranged(8, least=1)
    "Rows in one forward pass."
    json: str | None = None
    "File that takes the numbers as JSON."


@config
class GenerateJob:
    run: str
    "Run folder, one of its checkpoints, or a published model folder."
    prompt: str = field(default="", metadata={"prose": True})
    "Text to continue; empty starts a new document."
    question: str = field(default="", metadata={"prose": True})
    "Question to a fine-tuned model, asked by the chat template of its run or its tokenizer."
    step: int | None = ranged(None, least=0)
    "Step of the checkpoint; null is the newest good one."
    max_new_tokens: int = ranged(128, least=1, most=1_000_000)
    "Longest continuation, in tokens."
    temperature: float = ranged(0.0, least=0.0, most=100.0)
    "0 takes the likeliest token; higher is more varied."
    top_p: float = ranged(1.0, above=0.0, most=1.0)
    "Draw from the likeliest tokens that together have this probability."
    seed: int = ranged(0, least=0, most=2**31 - 1)
    "Seed of the draws."


@config
class ReportJob:
    run: str
    "Run folder."
    out: str | None = None
    "HTML file to write; null is report.html in the run folder."


@config
class PlanJob(Recipe):
    ranks: int | None = ranged(None, least=1, most=1_000_000)
    "Ranks to plan for; null is as started (1, or torchrun's number)."
    ranks_per_machine: int = ranged(8, least=1, most=1024)
    "Ranks that share one machine's memory, when ranks is given."
    hardware: str | None = None
    """Machine to plan for: a name of recipes/hardware, 8xH200 for eight ranks on such machines, or
    a .yaml file; null is this one."""
    schedule: bool = False
    "Also plan when pages move within a step: a table, and a drawing in `out`."
    trace: str | None = None
    """Run folder whose traced step to schedule, in place of one that the plan foresees: its
    trace.json and terms.json, from a run whose pages moved."""
    frames: int | None = ranged(None, least=1)
    "Pages in memory at once in the schedule; null is as many as the plan or the run has."
    out: str = "schedule.svg"
    "SVG file that takes the drawing of the schedule."


@config
class PlanExportJob:
    action: str
    "export."
    recipe: str = "m32"
    "Recipe of the model."
    scale: Scale = Scale.full
    "Its scale; full is as published."
    bits: str | None = None
    """Bits of a weight: 4 or 8, or 6 with format=fp6; 16 quantizes nothing; auto: 4, 8 or 16, and
    a group, for each linear at `size`. null is 4, or 6, or auto with a size."""
    size: str | None = None
    "Bytes of all tensors, like 23.3GB, with bits=auto."
    format: ExportFormat = ExportFormat.gptq
    "How codes are stored, as of ptm export."
    group: int = ranged(128, least=0, most=2**16)
    "Inputs that share a scale; 0 is one scale for each output."
    layers: Layers = Layers.published
    "Which linears: published, the router too, as the published files have it; or default."


@config
class DataJob(Recipe):
    action: DataAction
    "prepare: tokenize into the cache; check: list bad rows; show: print a row as a model gets it."
    row: int = ranged(0, least=0)
    "Which row to show."


@config
class BenchJob:
    name: str
    """Which benchmark: router or updates; engines, experts, train, wire, tiers and kernels have
    keys of their own."""
    steps: int = ranged(160, least=1)
    "Training steps of each run."
    seeds: int = ranged(3, least=1, most=100)
    "Runs of each kind, with seeds 0, 1, ..."
    jobs: int = ranged(0, least=0, most=64)
    "Runs at a time; 0 is one per core."
    out: str = "runs/bench"
    "Folder of the runs; finished ones are read, not run again."
    json: str | None = None
    "File that takes the numbers as JSON."


@config
class KernelBenchJob:
    bench: str
    "kernels."
    op: tuple[str, ...] = ()
    "Ops to measure, as in [rope_qk,add_rmsnorm]; empty is all."
    rounds: int = ranged(20, least=1, most=10_000)
    "Turns of every contestant."
    threads: int = ranged(1, least=1, most=1024)
    "Threads of every contestant; with one, time is the thread's CPU time."
    json: str | None = None
    "File that takes the numbers as JSON."
    svg: str | None = None
    "File that takes a bar chart."


@config
class DecodeBenchJob:
    """How fast a model generates, in bf16 and from its exports."""

    bench: str
    "decode."
    run: str
    "Run folder, one of its checkpoints, or a published model folder."
    exports: tuple[str, ...]
    "Folders that ptm export wrote of it."
    batches: tuple[int, ...] = ranged((1, 4, 16), least=1, most=4096)
    "Prompts at a time."
    threads: tuple[int, ...] = ranged((1, 2), least=1, most=1024)
    "Threads of one process."
    tokens: int = ranged(32, least=1, most=100_000)
    "New tokens of each prompt."
    rounds: int = ranged(5, least=1, most=1000)
    "Turns of every model that are measured."
    json: str | None = None
    "File that takes the numbers as JSON."


class PeerDtype(Choice):
    """In what peers hold the model."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@config
class GptqBenchJob:
    """Our GPTQ beside that of llm-compressor and GPTQModel."""

    bench: str
    "gptq."
    python: tuple[str, ...] = ()
    "Interpreters of other environments, where peers are installed."
    rows: int = ranged(64, least=1, most=4096)
    "Rows of 512 tokens to calibrate on."
    dtype: PeerDtype | None = None
    "In what peers hold the model; null is their default, as it is stored (bfloat16)."
    out: str = "runs/bench-gptq"
    "Folder of the model and the exports; those of peers that are there are not made again."
    json: str | None = None
    "File that takes the numbers as JSON."


@config
class StepBenchJob(Recipe):
    """Benches of whole steps, whose recipe words apply to every engine."""

    bench: str
    "Which benchmark: engines, experts, train, wire or tiers."
    ranks: int = ranged(2, least=1, most=64)
    "Ranks of every engine, on this machine."
    rounds: int = ranged(5, least=1, most=1000)
    "Turns of every engine that are measured."
    round_steps: int = ranged(4, least=1, most=10_000)
    "Steps in one turn."
    warmup: int = ranged(10, least=1, most=10_000)
    "Steps before the first measured turn."
    turn_timeout_s: int = ranged(600, least=5, most=86_400)
    "How long a turn may take before its engine counts as failed."
    only: tuple[str, ...] = ()
    """Rows to run, of bench engines, experts and train; empty is all. The basis (fsdp; in place;
    ptm) always runs."""
    ops_dir: str | None = None
    "Folder where DeepSpeed's ops were built ahead (its TORCH_EXTENSIONS_DIR)."
    out: str = "runs/bench-steps"
    "Folder for logs, and for the pages of engines that use a disk."
    json: str | None = None
    "File that takes the numbers as JSON."
