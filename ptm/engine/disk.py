"""The disk under the page store: a file, its errors in words, and what is checked before a run.

`File` is the seam at which tests put a disk that is full, slow, fails, or loses what was not
synced. O_DIRECT is used where the file system has it: pages go past the system's cache, which would
otherwise take from other programs, and from a memory limit, what the run was promised to leave.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ptm.common.errors import StorageError, line
from ptm.common.units import format_bytes

_REMEDIES = {
    "ENOSPC": "free space, or name another engine.ssd_path",
    "EDQUOT": "ask for a larger quota, or name another engine.ssd_path",
    "EFBIG": "raise the limit on file sizes (ulimit -f)",
    "EROFS": "name a writable engine.ssd_path",
    "EACCES": "name a writable engine.ssd_path",
    "EPERM": "name a writable engine.ssd_path",
    "ENOTDIR": "name a folder",
    "EEXIST": "name a folder",
}
_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
_NO_FILES = {"proc", "sysfs", "cgroup", "cgroup2", "devpts", "debugfs", "tracefs", "securityfs"}


class File:
    """An open file, read and written at offsets; no method keeps the interpreter's lock for I/O."""

    def __init__(self, path: Path, *, direct: bool = False, read_only: bool = False) -> None:
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
        self.path = path
        self.is_direct = False
        if direct and hasattr(os, "O_DIRECT"):
            try:
                self._file = os.open(path, flags | os.O_DIRECT, 0o644)
                self.is_direct = True
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        self._file = os.open(path, flags, 0o644)

    def read(self, offset: int, into: memoryview) -> None:
        while into:
            count = os.preadv(self._file, [into], offset)
            if count == 0:
                raise OSError(errno.EIO, f"ends at byte {offset}", str(self.path))
            offset, into = offset + count, into[count:]

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            count = os.pwritev(self._file, [data], offset)
            offset, data = offset + count, data[count:]

    def allocate(self, num_bytes: int) -> None:
        """Make room for all of it now, so that the disk cannot become full later."""
        if num_bytes:
            os.posix_fallocate(self._file, 0, num_bytes)
        os.ftruncate(self._file, num_bytes)

    def truncate(self, num_bytes: int) -> None:
        os.ftruncate(self._file, num_bytes)

    def sync(self) -> None:
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)


@contextlib.contextmanager
def disk_errors(path: Path, verb: str) -> Iterator[None]:
    """Turn an OSError inside into a StorageError: `path` cannot be `verb` (read, written)."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(path, error, verb) from error


def storage_error(path: Path, error: OSError, verb: str) -> StorageError:
    remedy = _REMEDIES.get(errno.errorcode.get(error.errno or 0, ""), "look at the disk")
    rule = f"cannot be {verb} ({error.strerror or error})"
    return StorageError(path_line(path, rule, remedy))


def path_line(path: Path, rule: str, remedy: str) -> str:
    """The house's line about a file or folder of the page store, whose name is never cut."""
    shown = str(path).encode("unicode_escape").decode("ascii")
    return f"engine.ssd_path={shown}: {rule}; {remedy}"


def sync_folder(folder: Path) -> None:
    """Make new files of `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(ssd_path: str | Path) -> Path:
    """Is `ssd_path` a writable folder (which may not exist yet) on a disk?

    Returns the nearest folder that is there. Raises StorageError.
    """
    path = Path(ssd_path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    kind = file_system(there)
    if kind in _MEMORY:
        rule = f"is memory ({kind}), not a disk"
        remedy = "name a folder on a disk, or give its room to engine.cpu_bytes"
        raise StorageError(line("engine.ssd_path", ssd_path, rule, remedy))
    if kind in _NO_FILES:
        rule = f"{there} holds no files ({kind})"
        raise StorageError(line("engine.ssd_path", ssd_path, rule, "name a folder on a disk"))
    if not there.is_dir():
        raise StorageError(line("engine.ssd_path", ssd_path, f"{there} is a file", "name a folder"))
    if not os.access(there, os.W_OK | os.X_OK) or os.statvfs(there).f_flag & os.ST_RDONLY:
        rule = f"{there} is not writable"
        raise StorageError(line("engine.ssd_path", ssd_path, rule, "name a writable folder"))
    return there


def check_disk(ssd_path: str | Path, needed_bytes: int, *, there_bytes: int = 0) -> None:
    """`check_folder`, and is there room?

    `there_bytes` of the needed are in a file of this rank already. Raises StorageError.
    """
    there = check_folder(ssd_path)
    with disk_errors(there, "read"):
        free = shutil.disk_usage(there).free
    if free < needed_bytes - there_bytes:
        rule = f"{format_bytes(needed_bytes - there_bytes)} of pages do not fit"
        rule = f"{rule} into the {format_bytes(free)} that are free"
        remedy = "free space, name another folder, or raise engine.cpu_bytes"
        raise StorageError(line("engine.ssd_path", ssd_path, rule, remedy))


def file_system(path: Path) -> str:
    """Kind of the file system that `path` lies on, `tmpfs` or `ext4`; empty where unknown."""
    found, best = "", -1
    with contextlib.suppress(OSError):
        real = str(path.resolve())
        for entry in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, kind, *_ = entry.split(" ")
            mount = mount.encode().decode("unicode_escape")  # a space is written \040
            inside = real == mount or real.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= best:
                found, best = kind, len(mount)
    return found


class FolderLock:
    """Keeps a second run away from a rank's files; the system frees it when the process dies."""

    def __init__(self, path: Path) -> None:
        with disk_errors(path, "written"):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._file, 200).decode(errors="replace") or "another process"
            os.close(self._file)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise storage_error(path, error, "locked") from error
            rule = f"is in use by {holder}"
            remedy = "stop that run, or name another engine.ssd_path"
            raise StorageError(path_line(path.parent, rule, remedy)) from None
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def close(self) -> None:
        os.close(self._file)
