"""What `ptm convert` can be told; apart from the work, so that errors need no torch."""

from __future__ import annotations

from ptm.common.config import Choice, config, ranged
from ptm.model.hf_names import Layout


class Target(Choice):
    """What a conversion writes."""

    ptm = "ptm"
    hf = "hf"


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
    "What to write: ptm (a checkpoint, for training and ptm's verbs) or hf (a published folder)."
    layout: Layout | None = None
    "Names in a published folder: hf, hf2, or null for those of the folder it came from, else hf."
    dtype: Stored | None = None
    "Number format of the weights written; null keeps every bit as it is."
    shard_bytes: int = ranged(5 * 2**30, least=2**20)
    "Most bytes in one file, unless one tensor is larger."
