"""What `ptm convert` and `ptm export` can be told; apart from the work, so that errors need no
torch."""

from __future__ import annotations

from typing import NamedTuple

from ptm.common.config import Choice, config, ranged
from ptm.common.errors import RecipeError, line
from ptm.common.units import parse_bytes
from ptm.model.hf_names import Layout
from ptm.quant.config import Layers


class Target(Choice):
    """What a conversion writes."""

    ptm = "ptm"
    hf = "hf"
    peft = "peft"


class Stored(Choice):
    """Number formats of stored weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@config
class ConvertConfig:
    source: str
    "Folder to read: a published Hugging Face folder, a run, or one of its checkpoints."
    out: str
    "Folder to write; it must be new or empty."
    to: Target = Target.ptm
    """What to write: ptm (a checkpoint, for training and ptm's verbs), hf (a published folder), or
    peft (of an adapter run the adapter alone, which the others merge with its base)."""
    layout: Layout | None = None
    "Names in a published folder: hf, hf2, or null for those of the folder it came from, else hf."
    dtype: Stored | None = None
    "Number format of the weights written; null keeps every bit as it is."
    shard_bytes: int = ranged(5 * 2**30, least=2**20)
    "Most bytes in one file, unless one tensor is larger."


BF16 = 16


class Width(NamedTuple):
    """How a linear is stored: bits of a weight, and inputs that share a scale, 0 for all."""

    bits: int
    group: int

    def __str__(self) -> str:
        return f"{self.bits}" if self == AS_IS else f"{self.bits}/{self.group or 'row'}"


AS_IS = Width(BF16, 0)
FINEST = 32
"""The smallest group of bits=auto."""


class ExportFormat(Choice):
    """How an export stores quantized weights."""

    gptq = "gptq"
    compressed_tensors = "compressed-tensors"
    fp6 = "fp6"


class Fp6(Choice):
    """The six-bit grids."""

    e3m2 = "e3m2"
    e2m3 = "e2m3"


class Method(Choice):
    """How codes are chosen."""

    auto = "auto"
    gptq = "gptq"
    nearest = "nearest"
    trained = "trained"


AUTO = "auto"


@config
class ExportConfig:
    run: str
    "Run folder, one of its checkpoints, or a published model folder."
    out: str | None = None
    "Folder to write; null is RUN/export/FORMAT-BITS, or FORMAT-SIZE with a size."
    format: ExportFormat = ExportFormat.gptq
    """gptq: what transformers, vLLM and GPTQModel read; compressed-tensors: pack-quantized; fp6:
    TC-FPx's 4+2 split."""
    bits: str | None = None
    """Bits of a weight: 4 or 8; 6 with format=fp6; auto: 4, 8 or 16, and a group, for each
    linear, so that by measurement least is lost at `size`. null is 4, or 6, or auto with a size."""
    size: str | None = None
    "Bytes of all tensors, like 23.3GB, with bits=auto; heads of files are beside it."
    group: int = ranged(128, least=0, most=2**16)
    "Inputs that share a scale; 0 is one scale for each output."
    symmetric: bool = True
    "Grids without zero points."
    fp6: Fp6 = Fp6.e2m3
    "The grid of format=fp6: e2m3 is finer, e3m2 is FP6-LLM's."
    layers: Layers = Layers.default
    """default: attention and experts; published: the router too, as the published M32 has it."""
    method: Method = Method.auto
    """gptq: by what the inputs are on calibration text; nearest: without text; trained: the codes
    that a run with a qat section was trained with; auto: trained for such a run, else gptq."""
    rows: int = ranged(128, least=1, most=1_000_000)
    "Rows of calibration text at first; more are added for experts that see too little."
    seq_len: int | None = ranged(None, least=2, most=2**20)
    "Tokens in a row; null is the run's train.seq_len."
    source: str | None = None
    "Text to calibrate on, as in data.source; null is what the run trains on."
    step: int | None = ranged(None, least=0)
    "Step of the checkpoint; null is the newest good one."
    seed: int = ranged(0, least=0, most=2**31 - 1)
    "Which rows of the run's text are taken; of source the first in an order of its own."
    micro_batch_size: int = ranged(8, least=1)
    "Rows in one forward pass."
    damping: float = ranged(0.005, above=0.0, most=1.0)
    "Added to the inputs' products, of their mean diagonal; raised where it is too little."
    candidates: int = ranged(24, least=0, most=1000)
    "Scales tried for each group; 0 takes the plain one."
    descents: int = ranged(3, least=0, most=100)
    "Passes over the codes after GPTQ's own."
    alpha: float = ranged(0.0, least=0.0, most=1.0)
    "How far outputs are kept those of the whole model (GPTAQ) and not of this layer alone."

    @property
    def width(self) -> int:
        """Bits of a weight."""
        if self.bits is None or self.bits == AUTO:
            return 6 if self.format is ExportFormat.fp6 else 4
        return int(self.bits)

    @property
    def widths(self) -> tuple[Width, ...]:
        """What bits=auto chooses among, besides AS_IS; of as many bits this group first."""
        group = self.group
        finer = (Width(4, FINEST),) if group > FINEST and group % FINEST == 0 else ()
        coarser = (Width(4, 0),) if group else ()
        return (Width(4, group), *finer, *coarser, Width(8, group))

    def check(self) -> None:
        """Raise RecipeError where two keys contradict each other."""
        wanted = ("6",) if self.format is ExportFormat.fp6 else ("4", "8")
        if self.bits not in (None, AUTO, *wanted):
            rule = f"format={self.format} has {' or '.join(wanted)}"
            if self.format is not ExportFormat.fp6:
                rule += ", or auto with a size"
            other = "give format=fp6" if self.bits == "6" else f"give bits={wanted[0]}"
            raise RecipeError(line("bits", self.bits, rule, other))
        if self.format is not ExportFormat.fp6 and self.fp6 is not Fp6.e2m3:
            rule, remedy = "is a grid of format=fp6", "add format=fp6, or leave it out"
            raise RecipeError(line("fp6", self.fp6, rule, remedy))
        if self.format is ExportFormat.fp6 and not self.symmetric:
            raise RecipeError(line("symmetric", "false", "fp6 has no zero points", "leave it out"))
        if self.size is None:
            if self.bits == AUTO:
                raise RecipeError(line("bits", AUTO, "needs a size", "give one, like size=23GB"))
            return
        parse_bytes(self.size, key="size")
        if self.format is ExportFormat.fp6 or self.bits not in (None, AUTO):
            rule = "chooses among 4, 8 and 16 bits"
            raise RecipeError(line("size", self.size, rule, "give bits=auto and no format=fp6"))


@config
class VerifyConfig:
    action: str
    "verify."
    export: str
    "Folder that ptm export wrote."
    run: str
    "What it was made from: a run folder, one of its checkpoints, or a published model folder."
    step: int | None = ranged(None, least=0)
    "Step of the checkpoint; null is the newest good one."
    rows: int = ranged(64, least=1)
    "Rows of held-out text."
    seq_len: int | None = ranged(None, least=2, most=2**20)
    "Tokens in a row; null is the run's train.seq_len."
    source: str | None = None
    "Text to compare on, all of it, as in data.source; null is what the run held out."
    micro_batch_size: int = ranged(4, least=1)
    "Rows in one forward pass."
    plain: str | None = None
    "Another export to show beside it, as of plain GPTQ (candidates=0 descents=0)."
    max_loss: float | None = ranged(None, least=0.0)
    "Most held-out loss over that of the run, in per cent; more ends with code 1."
    max_kl: float | None = ranged(None, least=0.0)
    "Most mean KL divergence from the run's predictions, in nats; more ends with code 1."
    json: str | None = None
    "File that takes the numbers as JSON."
    plot: str | None = None
    "SVG file that takes the drawing; null is verify.svg in the export."
