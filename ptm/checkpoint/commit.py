"""Rank 0's part of a save: is there room, what goes along, and the rename that makes it count."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash

from ptm.checkpoint import manifest as manifests
from ptm.checkpoint.folders import (
    beside,
    disk_errors,
    remove,
    storage_error,
    sync_folder,
)
from ptm.checkpoint.manifest import Attachment, Manifest
from ptm.checkpoint.verify import check_attachment
from ptm.common.errors import CheckpointError, StorageError, line
from ptm.common.units import format_bytes


def preflight(root: Path, num_bytes: int, *, keep: int) -> str | None:
    """Is there room in `root` (which may not exist yet) for checkpoints of `num_bytes` each?

    Returns a warning when the disk will fill before rotation starts to free room, else None.
    Raises: StorageError when not even one fits.
    """
    free = _free_bytes(root)
    check_room(root, num_bytes)
    there = 0
    if root.is_dir():
        there = sum(1 for entry in os.scandir(root) if entry.name.startswith("step-"))
    # keep, the best, and the new one, which is written before the oldest goes.
    wanted = max(1, keep + 2 - there)
    if free >= wanted * num_bytes:
        return None
    have = f"holds {free // num_bytes} of {wanted} more checkpoints of {format_bytes(num_bytes)}"
    return line("checkpoint.keep", keep, f"{root} {have}", "free space, or lower it")


def check_room(root: Path, num_bytes: int) -> None:
    """Raise StorageError unless the disk of `root` has `num_bytes` left."""
    free = _free_bytes(root)
    if free < num_bytes:
        rule = f"a checkpoint needs {format_bytes(num_bytes)}"
        remedy = "free space, or name another run.dir"
        raise StorageError(line(f"{root} free", format_bytes(free), rule, remedy))


def attach(tmp: Path, sources: Mapping[str, Path]) -> dict[str, Attachment]:
    """Copy files, and folders of files, into a checkpoint being written; read them back."""
    found = {}
    for name, source in sources.items():
        files = {name: source}
        if source.is_dir():
            files = {f"{name}/{path.name}": path for path in sorted(source.iterdir())}
            (tmp / name).mkdir()
        for inside, path in files.items():
            raw = path.read_bytes()
            manifests.write_file(tmp / inside, raw)
            found[inside] = Attachment(len(raw), xxhash.xxh3_128_hexdigest(raw))
            drop_cache(tmp / inside)
            with read_back_errors(tmp):
                check_attachment(tmp, inside, found[inside])
        if source.is_dir():
            sync_folder(tmp / name)
    return found


def commit(tmp: Path, folder: Path, manifest: Manifest) -> list[str]:
    """Seal `tmp`, whose files are on disk, with its manifest and name it `folder`.

    Returns notes on what stood in the way. Raises StorageError, CheckpointError; then `folder` is
    what it was before.
    """
    with disk_errors(folder):
        tops = {name.split("/")[0] for name in [*manifest.files, *manifest.attachments]}
        for name in sorted(tops ^ set(os.listdir(tmp))):
            remedy = "put run.dir on a file system that all nodes share"
            raise CheckpointError(line(f"{tmp}", name, "was not written by this save", remedy))
        manifests.write(tmp, manifest)
        sync_folder(tmp)
        if not os.path.lexists(folder):
            os.rename(tmp, folder)
            sync_folder(folder.parent)
            return []
        return _replace(tmp, folder, manifest.run_id)


def drop_cache(path: Path) -> None:
    """Have the next read of a synced file come from the disk, where the system offers that."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def read_back_errors(tmp: Path) -> Iterator[None]:
    """Turn a CheckpointError inside into a StorageError: what was just written reads otherwise."""
    try:
        yield
    except CheckpointError as error:
        rule = f"does not read back as written ({error})"
        raise StorageError(line(f"{tmp.parent}", tmp.name, rule, "look at the disk")) from error


def _replace(tmp: Path, folder: Path, run_id: str) -> list[str]:
    try:
        kind = "old" if manifests.read(folder).run_id == run_id else "alien"
    except CheckpointError:
        kind = "bad"
    aside = beside(folder, kind)
    os.rename(folder, aside)
    try:
        os.rename(tmp, folder)
    except OSError:
        os.rename(aside, folder)
        raise
    sync_folder(folder.parent)
    if kind != "old":
        return [f"{folder.name} was there already: it is kept as {aside.name}"]
    try:
        remove(aside)
    except OSError as error:  # the new one is good; the old one goes at the next start
        return [str(storage_error(aside, error))]
    return [f"{folder.name} replaces the same step saved before"]


def _free_bytes(root: Path) -> int:
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    with disk_errors(root):
        return shutil.disk_usage(there).free
