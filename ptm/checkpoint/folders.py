"""The names in a run's checkpoints folder, and the moves that are safe under a kill.

    step-00000120                a whole checkpoint: a folder gets this name by one rename
    step-00000120.tmp-<uuid>     being written, or left by a save that died
    step-00000120.old-<uuid>     replaced by the same step saved again, about to go
    step-00000120.trash-<uuid>   being deleted
    step-00000120.bad-<uuid>     damaged; kept for people to look at, never read or deleted
    step-00000120.alien-<uuid>   was in the way and is not of this run; never read or deleted

Saving a step again is two renames: the old folder to .old, the new one to its name. A kill between
them leaves .old, which `clean` renames back, so at no moment the good one is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ptm.common.errors import StorageError, line

_STEP = re.compile(r"step-(\d{8,12})")
_LEFT = re.compile(r"(step-\d{8,12})\.(tmp|old|trash)-[0-9a-f]{32}")
_REMEDIES = {
    "ENOSPC": "free space, or lower checkpoint.keep",
    "EDQUOT": "ask for a larger quota, or lower checkpoint.keep",
    "EFBIG": "raise the limit on file sizes (ulimit -f)",
    "EROFS": "name a writable run.dir",
    "EACCES": "name a writable run.dir",
}


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def beside(folder: Path, kind: str) -> Path:
    """A new name for `folder`, of the kinds above."""
    return folder.with_name(f"{folder.name}.{kind}-{uuid.uuid4().hex}")


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all that have a checkpoint's name, newest first. Links are not followed."""
    found = []
    for entry in _entries(root):
        named = _STEP.fullmatch(entry.name)
        if named and entry.is_dir(follow_symlinks=False):
            found.append((int(named.group(1)), Path(entry.path)))
    return sorted(found, reverse=True)


def clean(root: Path) -> list[str]:
    """Finish what a killed save or deletion has left; returns the names it removed or renamed back.

    Only for the process that saves here: another one's unfinished save would be removed.
    """
    done = []
    for entry in _entries(root):
        left = _LEFT.fullmatch(entry.name)
        if not left or not entry.is_dir(follow_symlinks=False):
            continue
        home = root / left.group(1)
        if left.group(2) == "old" and not home.exists():
            os.rename(entry.path, home)
            sync_folder(root)
        else:
            remove(Path(entry.path))
        done.append(entry.name)
    return done


def remove(folder: Path) -> None:
    """Delete a folder so that no kill leaves half of it under its name. Raises OSError."""
    if not _LEFT.fullmatch(folder.name):
        trash = beside(folder, "trash")
        os.rename(folder, trash)
        folder = trash
    shutil.rmtree(folder)


def set_aside(folder: Path, kind: str) -> Path:
    """Rename a folder to its .bad or .alien name, which nothing here reads or deletes."""
    aside = beside(folder, kind)
    os.rename(folder, aside)
    sync_folder(folder.parent)
    return aside


def sync_folder(folder: Path) -> None:
    """Make renames and new files of `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(folder: Path, *, is_out: bool = False) -> Iterator[None]:
    """Turn an OSError inside into a StorageError (exit code 74) that says what to do. is_out: the
    folder is what `out` named."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(folder, error, is_out=is_out) from error


def storage_error(folder: Path, error: OSError, *, is_out: bool = False) -> StorageError:
    remedy = _REMEDIES.get(errno.errorcode.get(error.errno or 0, ""), "look at the disk")
    rule = f"cannot be written ({error.strerror or error})"
    if is_out:
        return StorageError(line("out", folder, rule, "name another folder, or make room there"))
    return StorageError(line("checkpoint", error.filename or folder, rule, remedy))


def _entries(root: Path) -> list[os.DirEntry[str]]:
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        return sorted(entries, key=lambda entry: entry.name)
