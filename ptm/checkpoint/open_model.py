"""What is this folder? A checkpoint, a run, or a published model, opened as a model either way.

A checkpoint has manifest.json and is verified, every byte of it, before a weight is used. A run has
checkpoints/, of which the newest good one is taken. A published folder has config.json; it comes
without hashes, so its names, shapes and sizes are all that can be checked. PEFT's files have
adapter_config.json, and open as the model that they make of the base named there.

A run that starts from a model pins it: a base that is a run may train on, a folder may be filled
anew, and frozen weights, a reference and a teacher must stay what they were at the first step. A
checkpoint of low-rank changes names its base so, and opens as the model that both make.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import xxhash

from ptm.checkpoint import hf_config, manifest, peft
from ptm.checkpoint.hf import Opened, open_hf
from ptm.checkpoint.load import newest_good
from ptm.checkpoint.merged import ADAPTER_KEY, BASE_KEY, open_adapter
from ptm.checkpoint.peft_source import base_folder, open_peft
from ptm.checkpoint.verify import verify
from ptm.checkpoint.weights import open_checkpoint
from ptm.common.errors import CheckpointError, line
from ptm.model.lora_config import AdapterKind

END_BYTES = 2**20


class Base(NamedTuple):
    """A model folder, absolute, and the digest of what it held."""

    folder: str
    digest: str


def open_model(folder: Path, *, may_have_soft: bool = False) -> Opened:
    """What a model folder holds, its weights unread. Raises CheckpointError; may_have_soft: also
    where soft tokens or a prefix are among the weights, for whoever computes with them."""
    opened = _open(folder)
    if opened.beside.kind is not AdapterKind.none and not may_have_soft:
        is_soft = opened.beside.kind is AdapterKind.prompt
        what = f"{opened.beside.prompt_tokens} soft tokens" if is_soft else "a prefix"
        rule = f"is {what} beside its base, and no weight can take {'them' if is_soft else 'it'} up"
        uses = "generate, eval or convert to=peft" if is_soft else "generate or eval"
        remedy = f"name its base, or use {uses}"
        raise CheckpointError(line("folder", folder, rule, remedy))
    return opened


def _open(folder: Path) -> Opened:
    if (folder / manifest.FILE).exists():
        found = verify(folder)
    elif (folder / "checkpoints").is_dir():
        found = newest_good(folder / "checkpoints")
        if found is None:
            raise CheckpointError(line("run", folder, "has no checkpoint yet", "let it save one"))
    elif (folder / hf_config.FILE).exists():
        return open_hf(folder)
    elif (folder / peft.CONFIG).exists():
        return open_peft(folder, open_model)
    else:
        rule = "has no manifest.json, checkpoints, config.json or adapter_config.json"
        raise CheckpointError(line("folder", folder, rule, "name a run, checkpoint or model"))
    notes = tuple(reason for _, reason in found.rejected)
    if ADAPTER_KEY not in found.manifest.meta:
        return open_checkpoint(found.folder, found.manifest)._replace(notes=notes)
    base = open_base(_base_from_json(found.manifest.meta.get(BASE_KEY)))
    opened = open_adapter(found.folder, found.manifest, base)
    return opened._replace(notes=notes + base.notes)


def base_of(folder: Path) -> Base:
    """Pin a run's newest step, a checkpoint or a published folder. Raises CheckpointError."""
    found = open_model(folder).folder.resolve()
    return Base(str(found), digest_of(found))


def open_base(base: Base) -> Opened:
    """Raises CheckpointError where the folder is gone or holds another model."""
    folder = Path(base.folder)
    if not folder.is_dir():
        rule = "is not there, and this run began with its weights"
        raise CheckpointError(line("train.init_from", folder, rule, "put it back"))
    if digest_of(folder) != base.digest:
        rule = "holds other weights than those that this run began with"
        remedy = "put them back, or start a new run with another run.dir"
        raise CheckpointError(line("train.init_from", folder, rule, remedy))
    return open_model(folder)


def digest_of(folder: Path) -> str:
    """A checkpoint is known by its manifest, which hashes every byte; a published folder by
    config.json and the size, first and last MiB of each of its weight files; PEFT's files so, and
    by the base they name."""
    digest = xxhash.xxh3_128()
    if (folder / manifest.FILE).is_file():
        digest.update((folder / manifest.FILE).read_bytes())
        return digest.hexdigest()
    if (folder / peft.CONFIG).is_file():
        digest.update(base_of(base_folder(folder)).digest.encode())
    configs = folder / hf_config.FILE, folder / peft.CONFIG
    for path in (*configs, *sorted(folder.glob("*.safetensors"))):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(END_BYTES))
                file.seek(max(0, size - END_BYTES))
                digest.update(file.read(END_BYTES))
    return digest.hexdigest()


def _base_from_json(values: object) -> Base:
    if not isinstance(values, dict) or not all(type(values.get(k)) is str for k in Base._fields):
        rule, remedy = f"must have {', '.join(Base._fields)}", "use the ptm that wrote it"
        raise CheckpointError(f"{manifest.FILE}: " + line(BASE_KEY, values, rule, remedy))
    return Base(*(values[key] for key in Base._fields))
