"""Convert a model between published Hugging Face folders and checkpoints of ptm, both ways.

Weights are copied bit for bit, in pieces of 64 MiB or one expert's matrix, so a model of any size
needs little memory; `dtype` converts on the way. A folder appears under its name when it is whole.
What a published folder was beyond its weights (layout, keys of config.json, the copy of a tied
embedding) goes along in the checkpoint, so converting back gives the same folder. From a run the
newest good step is taken, and its optimizer states are left behind.

Nothing in a model folder is executed. Code, pickles and generation settings are not copied; what
stays behind is listed.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ptm.checkpoint.hf import Opened, left_behind, write_hf
from ptm.checkpoint.manifest import write_file
from ptm.checkpoint.open_model import open_model
from ptm.checkpoint.peft import write_peft
from ptm.checkpoint.shards import new_folder
from ptm.checkpoint.weights import write_checkpoint
from ptm.common.errors import as_typed
from ptm.data.tokenizer import load_tokenizer
from ptm.export.config import ConvertConfig, Stored, Target
from ptm.model.config import num_parameters
from ptm.model.hf_names import Layout

_DTYPES = {
    Stored.fp32: torch.float32,
    Stored.bf16: torch.bfloat16,
    Stored.fp16: torch.float16,
}
TOKENIZER_CONFIG = "tokenizer_config.json"


def convert(config: ConvertConfig) -> None:
    """Write `config.out` from `config.source`. Raises CheckpointError, StorageError."""
    console = Console(highlight=False)
    source, out = Path(config.source), Path(config.out)
    dtype = _DTYPES[config.dtype] if config.dtype is not None else None
    with as_typed({"folder": "source", "run": "source"}):
        opened = open_model(source, may_have_soft=config.to is Target.peft)
    layout = config.layout or (opened.origin.layout if opened.origin else Layout.hf)
    count = num_parameters(opened.model)
    columns = BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    text = TextColumn("{task.description}", markup=False)
    with (
        new_folder(out) as folder,
        Progress(text, *columns, TimeRemainingColumn(), console=console) as progress,
    ):
        task = progress.add_task(f"{source.name} -> {config.to}", total=None)

        def show(done_bytes: int, all_bytes: int) -> None:
            progress.update(task, completed=done_bytes, total=all_bytes)

        if config.to is Target.peft:
            count = write_peft(folder, opened, layout=layout, dtype=dtype)
        elif config.to is Target.ptm:
            write_checkpoint(
                folder, opened, dtype=dtype, shard_bytes=config.shard_bytes, on_piece=show
            )
        else:
            ids = finish_tokenizer(opened, folder)
            write_hf(
                folder,
                opened,
                layout=layout,
                dtype=dtype,
                shard_bytes=config.shard_bytes,
                ids=ids,
                on_piece=show,
            )
    notes = list(opened.notes)
    if opened.origin is not None and opened.tokenizer == source:
        notes += [f"not copied: {name!r}" for name in left_behind(source)]
    if config.to is Target.hf and opened.model.router_bias_update_rate > 0:
        notes.append("left out, as the published format has no place for it: the router's bias")
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"{out}: {count:,} parameters as {config.to}", markup=False, soft_wrap=True)


def finish_tokenizer(opened: Opened, folder: Path) -> dict[str, int | None]:
    # The ids that config.json needs, and what a tokenizer trained here lacks beside its own file.
    # The published code pads, begins and ends with one token, <eod>, and never adds it by itself.
    if opened.origin is not None or not opened.tokenizer.is_dir():
        return {}
    tokenizer = load_tokenizer(opened.tokenizer)
    if not (opened.tokenizer / TOKENIZER_CONFIG).exists():
        is_fast = (opened.tokenizer / "tokenizer.json").exists()
        eod = next(text for text, i in tokenizer.specials.items() if i == tokenizer.eod_id)
        keys = {
            "tokenizer_class": "PreTrainedTokenizerFast" if is_fast else "LlamaTokenizer",
            "add_bos_token": False,
            "add_eos_token": False,
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), eod),
        }
        write_file(folder / TOKENIZER_CONFIG, (json.dumps(keys, indent=2) + "\n").encode())
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "eod_token")
    return {**dict.fromkeys(names, tokenizer.eod_id), "sep_token": tokenizer.sep_id}
