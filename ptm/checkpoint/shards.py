"""Tensors into the safetensors files of a new folder, each file at most so many bytes.

The files are planned from names and shapes, then filled one piece at a time, so memory does not
grow with the model. A conversion of dtype happens on the way, and one that would turn a finite
number into infinity is refused.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ptm.checkpoint.folders import beside, disk_errors, sync_folder
from ptm.checkpoint.safetensors_file import SafetensorsWriter, as_bytes
from ptm.checkpoint.source import TensorSource, stream
from ptm.common.errors import CheckpointError, StorageError, line
from ptm.common.units import format_bytes
from ptm.model.hf_names import Rows

MAX_TENSORS_PER_FILE = 20_000  # keeps any header far below the reader's limit

OnPiece = Callable[[int, int], None]  # bytes done, bytes in all


def refuse_taken(out: Path) -> None:
    """Raise CheckpointError when `out` is there already with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(line("out", out, "is there already", "name a new folder"))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` in one rename at the end, or is removed on an error.

    Raises as `refuse_taken`.
    """
    refuse_taken(out)
    folder = beside(out, "tmp")
    with disk_errors(out, is_out=True):
        try:
            folder.mkdir(parents=True)
            yield folder
            for inside in (folder, *(path for path in folder.iterdir() if path.is_dir())):
                sync_folder(inside)
            os.rename(folder, out)
            sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def write_shards(
    folder: Path,
    source: TensorSource,
    tensors: Mapping[str, Rows],
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
    on_piece: OnPiece = lambda done_bytes, all_bytes: None,
) -> dict[str, dict[str, str]]:
    """Write `tensors`, rows of `source`'s, into `folder`; returns file -> tensor -> xxh3_128.

    `dtype` None keeps every bit as it is. `on_piece` hears of every piece written. Raises
    StorageError before the first byte when the disk has too little room.
    """
    kinds = {
        name: dtype or source.info(rows.pieces[0].name).dtype for name, rows in tensors.items()
    }
    sizes = {name: math.prod(tensors[name].shape) * kinds[name].itemsize for name in tensors}
    free = shutil.disk_usage(folder).free
    if sum(sizes.values()) > free:
        rule = f"must be {format_bytes(sum(sizes.values()))} or more"
        remedy = "free space, or name an out on another disk"
        raise StorageError(line(f"{folder.parent} free", format_bytes(free), rule, remedy))
    done_bytes, all_bytes = 0, sum(sizes.values())
    digests: dict[str, dict[str, str]] = {}
    for file, names in plan_files(sizes, shard_bytes).items():
        digests[file] = {}
        header = {name: (tensors[name].shape, kinds[name]) for name in names}
        with SafetensorsWriter(folder / file, header) as writer:
            for name in writer.names:
                digest = xxhash.xxh3_128()
                for piece in stream(source, tensors[name]):
                    made = cast(name, piece, kinds[name])
                    writer.write(name, made)
                    digest.update(as_bytes(made))
                    done_bytes += made.numel() * made.dtype.itemsize
                    on_piece(done_bytes, all_bytes)
                digests[file][name] = digest.hexdigest()
    return digests


def plan_files(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Tensors of each file, in order; a file is over `shard_bytes` only if one tensor is."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > shard_bytes or len(groups[-1]) == MAX_TENSORS_PER_FILE:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
        for i, names in enumerate(groups, 1)
    }


def cast(name: str, piece: Tensor, dtype: torch.dtype) -> Tensor:
    """`piece` in `dtype`. Raises CheckpointError where a finite number would become infinite."""
    if piece.dtype == dtype:
        return piece
    made = piece.to(dtype)
    if not bool(made.isfinite().all()) and bool(piece.isfinite().all()):
        raise CheckpointError(
            line(
                "dtype",
                dtype,
                f"cannot hold {name}, which reaches {piece.abs().max():g}",
                "use bf16",
            )
        )
    return made
