"""Published Hugging Face folders: open one as our model's tensors, write one from them.

    config.json          read by an allow-list, ptm/checkpoint/hf_config.py
    model.safetensors    or, for several files, model.safetensors.index.json and what it names
    tokenizer files      copied from an allow-list of names, never run or rendered here

Opening reads headers and compares every name and shape with what config.json implies; tensors are
read when asked for, one at a time. A tied model's lm_head.weight must equal the embedding, and is
then dropped; `Origin` remembers it, the layout and the keys of config.json, so that the folder can
be rebuilt as it was.

Pickled weights (*.bin, *.pt) are never opened: reading one can run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptm.checkpoint import hf_config, quant_config
from ptm.checkpoint.dequant import QuantSource
from ptm.checkpoint.manifest import write_file
from ptm.checkpoint.safetensors_file import MAX_HEADER_BYTES
from ptm.checkpoint.shards import OnPiece, write_shards
from ptm.checkpoint.source import (
    FolderSource,
    RowsSource,
    TensorSource,
    all_rows,
    check_shapes,
    stream,
)
from ptm.checkpoint.untrusted import read_bytes, read_json
from ptm.common.errors import CheckpointError, line
from ptm.model.config import ModelConfig
from ptm.model.hf_names import EMBEDDING, HEAD, Layout, imported, layout_of, published
from ptm.model.lora_config import ALL_WEIGHTS, AdapterConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
MAX_TOKENIZER_BYTES = 64 * 2**20
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")


class Origin(NamedTuple):
    """What a published folder looked like beyond its weights; kept in a checkpoint made from it."""

    layout: Layout
    tied_copy: bool
    config: dict[str, Any]


class Opened(NamedTuple):
    """A model folder of either kind: its configuration, and its weights under our names."""

    model: ModelConfig
    weights: TensorSource
    origin: Origin | None
    tokenizer: Path
    notes: tuple[str, ...]
    folder: Path
    """Where the weights are: of a run, the step that was taken."""
    quantized: QuantSource | None = None
    "The codes under published names, where the folder is an export."
    beside: AdapterConfig = ALL_WEIGHTS
    "Of tensors among the weights that no other weight can take up: soft tokens or a prefix."


def open_hf(folder: Path) -> Opened:
    """Open a published folder. Raises CheckpointError naming the file, key or tensor at fault."""
    keys = read_json(folder, hf_config.FILE)
    quantization = keys.pop(quant_config.KEY, None)
    parsed = hf_config.parse(keys)
    model, notes = parsed.model, list(parsed.notes)
    source: TensorSource = open_weights(folder)
    quantized = None
    if quantization is not None:
        source = quantized = QuantSource(source, quant_config.parse(quantization))
        if (folder / quant_config.TWIN).exists():
            quant_config.compare(quantization, read_json(folder, quant_config.TWIN))
    names = [name for name in source.names() if not name.endswith("rotary_emb.inv_freq")]
    if len(names) < len(source.names()):
        notes.append("rotary_emb.inv_freq ignored: computed from the configuration")
    layout = layout_of(names)
    tied_copy = model.tie_word_embeddings and HEAD in names
    tensors = published(model, layout, tied_copy=tied_copy)
    kept = RowsSource(source, {name: all_rows(source, name) for name in names})
    check_shapes(kept, {name: rows.shape for name, rows in tensors.items()}, folder)
    if tied_copy:
        _check_tied(kept)
    weights = RowsSource(kept, imported(model, layout))
    origin = Origin(layout, tied_copy, parsed.carried)
    return Opened(model, weights, origin, folder, tuple(notes), folder, quantized)


def write_hf(
    folder: Path,
    opened: Opened,
    *,
    layout: Layout,
    dtype: torch.dtype | None,
    shard_bytes: int,
    ids: Mapping[str, int | None],
    on_piece: OnPiece = lambda done_bytes, all_bytes: None,
) -> None:
    """Fill `folder` with config.json, weights and tokenizer that the published code reads.

    A model that did not come from a published folder gets its config.json from `ids` (pad_token_id
    and so on) and, when tied, the copy in lm_head.weight that M32 has. Raises CheckpointError,
    StorageError.
    """
    model, origin = opened.model, opened.origin
    tensors = published(model, layout, tied_copy=origin is None or origin.tied_copy)
    files = write_shards(
        folder, opened.weights, tensors, dtype=dtype, shard_bytes=shard_bytes, on_piece=on_piece
    )
    if len(files) > 1:
        kinds = {
            name: dtype or opened.weights.info(rows.pieces[0].name).dtype
            for name, rows in tensors.items()
        }
        total = sum(math.prod(tensors[name].shape) * kinds[name].itemsize for name in tensors)
        where = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_file(folder / INDEX, _json(index))
    keys = hf_config.render(model, origin.config if origin else None, **ids)
    if dtype is not None or keys.get("torch_dtype") is None:
        keys = hf_config.with_dtype(keys, dtype or opened.weights.info(EMBEDDING).dtype)
    write_file(folder / hf_config.FILE, _json(keys))
    copy_tokenizer(opened.tokenizer, folder)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files of a folder, byte by byte; returns their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).exists()]
    for name in names:
        write_file(target / name, read_bytes(source, name, MAX_TOKENIZER_BYTES))
    return names


def left_behind(folder: Path) -> list[str]:
    """Names of the files of a published folder that a conversion does not copy."""
    known = {hf_config.FILE, INDEX, *TOKENIZER_FILES}
    return sorted(
        p.name for p in folder.iterdir() if p.name not in known and p.suffix != ".safetensors"
    )


def open_weights(folder: Path) -> FolderSource:
    """The safetensors files of a published folder. Raises CheckpointError."""
    if (folder / WEIGHTS).exists():
        if (folder / INDEX).exists():
            raise CheckpointError(
                line("folder", folder, f"has both {WEIGHTS} and {INDEX}", "remove the stale one")
            )
        return FolderSource(folder, [WEIGHTS])
    if not (folder / INDEX).exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            rule = f"has pickled weights only ({pickles[0]}), and reading a pickle can run code"
            raise CheckpointError(
                line("folder", folder, rule, "ask its publisher for safetensors files")
            )
        raise CheckpointError(
            line("folder", folder, f"has no {WEIGHTS}", "get the whole folder again")
        )
    where = read_json(folder, INDEX, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(
            line(INDEX, "weight_map", "must map tensors to files", "get it again")
        )
    source = FolderSource(folder, list(set(where.values())))
    for name in sorted(where.keys() ^ set(source.names())):
        kind = "is not in its file" if name in where else f"is not in {INDEX}"
        raise CheckpointError(line("tensor", name, kind, "get the whole folder again"))
    for name, file in where.items():
        if source.files_of(name) != [file]:
            found = source.files_of(name)[0]
            raise CheckpointError(
                line("tensor", name, f"is in {found} and not in {file}", "were two files swapped?")
            )
    return source


def _check_tied(source: TensorSource) -> None:
    head, embedding = (stream(source, all_rows(source, name)) for name in (HEAD, EMBEDDING))
    for a, b in zip(head, embedding):
        if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            rule = f"must equal {EMBEDDING}, as tie_word_embeddings is true"
            raise CheckpointError(line("tensor", HEAD, rule, "set tie_word_embeddings to false"))


def _json(keys: dict[str, Any]) -> bytes:
    return (json.dumps(keys, indent=2, ensure_ascii=False) + "\n").encode()
