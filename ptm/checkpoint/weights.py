"""A checkpoint of ptm as a model: opened from any step, or written with weights only.

A conversion writes the folder of ptm/checkpoint/manifest.py without optimizer states, at step 0.
Its meta holds two objects:

    model        the keys of ModelConfig, as every checkpoint must have them
    published    layout, tied_copy, config: what the published folder was beyond its weights, if
                 the weights came from one, so that it can be rebuilt as it was
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import torch
import xxhash

from ptm.checkpoint import hf_config, manifest
from ptm.checkpoint.hf import Opened, Origin, copy_tokenizer
from ptm.checkpoint.manifest import MODEL, WEIGHTS, Attachment, Manifest
from ptm.checkpoint.safetensors_file import SafetensorsFile
from ptm.checkpoint.shards import OnPiece, write_shards
from ptm.checkpoint.source import FolderSource, RowsSource, TensorSource, all_rows, check_shapes
from ptm.common.config import Choice
from ptm.common.errors import CheckpointError, PtmError, line
from ptm.engine.state import stored_shape
from ptm.model.config import ModelConfig, RouterKind
from ptm.model.hf_names import Layout, Rows
from ptm.model.transformer import Transformer

TOKENIZER = "tokenizer"
MODEL_KEY, PUBLISHED_KEY = "model", "published"


def open_checkpoint(folder: Path, found: Manifest) -> Opened:
    """The model in a checkpoint folder that was verified. Raises CheckpointError."""
    model = model_from_json(found.meta.get(MODEL_KEY))
    shapes = _shapes(model, most_layers=len(found.census))
    weights = stored_weights(folder, found, shapes)
    if model.router is RouterKind.attention:  # others have no published form: said by the writer
        check_shapes(weights, shapes, folder)
    origin = _origin(found.meta[PUBLISHED_KEY]) if PUBLISHED_KEY in found.meta else None
    return Opened(model, weights, origin, folder / TOKENIZER, (), folder)


def stored_weights(
    folder: Path, found: Manifest, shapes: dict[str, tuple[int, ...]]
) -> TensorSource:
    """What a verified checkpoint holds beside optimizer states, in `shapes` where it fits them."""
    source = FolderSource(folder, list(found.files))
    return RowsSource(
        source,
        {
            name.removeprefix(MODEL): _as_model_has(source, name, shapes)
            for name in found.census
            if name.startswith(MODEL)
        },
    )


def write_checkpoint(
    folder: Path,
    opened: Opened,
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
    on_piece: OnPiece = lambda done_bytes, all_bytes: None,
) -> None:
    """Fill `folder` with a checkpoint of weights only. Raises CheckpointError, StorageError."""
    weights = opened.weights
    tensors = {MODEL + name: all_rows(weights, name) for name in weights.names()}
    digests = write_shards(
        folder, weights, tensors, dtype=dtype, shard_bytes=shard_bytes, on_piece=on_piece
    )
    files = {
        file: manifest.describe(
            SafetensorsFile(folder, file), {n: (0, d) for n, d in found.items()}
        )
        for file, found in digests.items()
    }
    kinds = {n: dtype or weights.info(rows.pieces[0].name).dtype for n, rows in tensors.items()}
    meta: dict[str, Any] = {MODEL_KEY: model_to_json(opened.model)}
    if opened.origin is not None:
        keys = opened.origin.config
        keys = keys if dtype is None else hf_config.with_dtype(keys, dtype)
        meta[PUBLISHED_KEY] = opened.origin._replace(config=keys)._asdict()
    made = Manifest(
        step=0,
        run_id="",
        world=1,
        holds=WEIGHTS,
        census={n: manifest.entry_of(rows.shape, kinds[n]) for n, rows in tensors.items()},
        files=files,
        attachments=_attach(opened.tokenizer, folder),
        meta=meta,
    )
    manifest.write(folder, made)


def model_to_json(model: ModelConfig) -> dict[str, Any]:
    """The model section as plain JSON values."""
    values = dataclasses.asdict(model)
    return {key: str(v) if isinstance(v, Choice) else v for key, v in values.items()}


def model_from_json(values: Any) -> ModelConfig:
    """The model section of a manifest. Raises CheckpointError naming the key."""
    if not isinstance(values, dict):
        raise _refuse(MODEL_KEY, values, "must be an object")
    types = typing.get_type_hints(ModelConfig)
    made = {}
    for key, value in values.items():
        kind = types.get(key)
        if kind is None:
            raise _refuse(key, value, "is no key of a model that this ptm knows")
        try:
            # A choice is spelt as a string; bool is an int to isinstance, hence type().
            made[key] = kind(value) if issubclass(kind, Choice) else value
        except ValueError:
            raise _refuse(key, value, f"must be one of {', '.join(map(str, kind))}") from None
        if type(made[key]) is not kind and not (kind is float and type(value) is int):
            raise _refuse(key, value, f"must be of type {kind.__name__}")
    try:
        return ModelConfig(**made)
    except PtmError as error:
        raise CheckpointError(f"{manifest.FILE}: {error}") from None


def _shapes(model: ModelConfig, *, most_layers: int) -> dict[str, tuple[int, ...]]:
    # More layers than tensors: it cannot fit, and to see that not all of them need be made.
    layers = min(model.num_hidden_layers, most_layers)
    made = Transformer(dataclasses.replace(model, num_hidden_layers=layers), device="meta")
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}


def _as_model_has(source: TensorSource, name: str, shapes: dict[str, tuple[int, ...]]) -> Rows:
    # An engine saves the matrices of all experts below each other.
    rows, shape = all_rows(source, name), shapes.get(name.removeprefix(MODEL), ())
    return rows._replace(shape=shape) if stored_shape(shape) == rows.shape else rows


def _attach(tokenizer: Path, folder: Path) -> dict[str, Attachment]:
    found = {}
    (folder / TOKENIZER).mkdir()
    for name in copy_tokenizer(tokenizer, folder / TOKENIZER):
        raw = (folder / TOKENIZER / name).read_bytes()
        found[f"{TOKENIZER}/{name}"] = Attachment(len(raw), xxhash.xxh3_128_hexdigest(raw))
    if not found:
        (folder / TOKENIZER).rmdir()
    return found


def _origin(values: Any) -> Origin:
    if not isinstance(values, dict) or values.keys() != set(Origin._fields):
        raise _refuse(PUBLISHED_KEY, values, f"must have {', '.join(Origin._fields)}")
    layout, tied_copy, config = (values[name] for name in Origin._fields)
    if layout not in list(Layout) or type(tied_copy) is not bool or not isinstance(config, dict):
        raise _refuse(PUBLISHED_KEY, (layout, tied_copy), "must be a layout and a switch")
    return Origin(Layout(layout), tied_copy, hf_config.parse(config).carried)


def _refuse(key: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(
        f"{manifest.FILE}: " + line(key, value, rule, "use the ptm that wrote it")
    )
