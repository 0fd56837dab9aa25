"""Is this checkpoint folder what its manifest says? Asked before one weight of it is used.

`verify` streams every byte of the folder through its hash, shared among the ranks. Together they
refuse, with file and tensor named: a flipped bit, a truncated, missing, extra, swapped, foreign or
linked file, a header that disagrees with the manifest. Nothing is parsed before its size is
bounded, and nothing is ever executed (see untrusted.py). A folder changed after it was verified is
not guarded against.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from ptm.checkpoint import manifest as manifests
from ptm.checkpoint.manifest import Attachment, Entry, Manifest, Piece, ShardFile
from ptm.checkpoint.safetensors_file import SafetensorsFile
from ptm.checkpoint.source import OFFSETS_KEY, SHARDING_KEY
from ptm.checkpoint.untrusted import open_file, parse_object, pread_into
from ptm.common.errors import CheckpointError, line
from ptm.mesh.peers import Peers

BLOCK_BYTES = 4 * 2**20
REMEDY = "use another checkpoint"


class OtherRun(CheckpointError):
    """The folder may be good, but it is another run's."""


class Good(NamedTuple):
    """A folder that was verified; `rejected` are newer ones that were not good, with reasons."""

    folder: Path
    manifest: Manifest
    rejected: tuple[tuple[Path, str], ...] = ()


def verify(folder: Path, peers: Peers | None = None, *, run_id: str | None = None) -> Good:
    """Check every byte of a checkpoint, each rank its share.

    Raises, on all ranks: CheckpointError; NewerFormat when the folder is sound but needs a newer
    ptm; OtherRun, before anything but the manifest is read, when `run_id` is given and not its own.
    """
    peers = peers or Peers()
    read: list[Manifest] = []

    def look() -> None:
        with _read_errors(folder):
            read.append(_look(folder, run_id))

    def check() -> None:
        with _read_errors(folder):
            _check_share(folder, read[0], peers.rank, peers.world)

    peers.together(look)
    peers.together(check)
    return Good(folder, read[0])


def check_header(file: SafetensorsFile, entry: ShardFile, census: dict[str, Entry]) -> None:
    """Compare a file's header with the manifest. Raises CheckpointError."""
    if file.num_bytes != entry.size_bytes:
        raise _bad(file, f"{file.num_bytes} bytes", f"must be {entry.size_bytes}")
    header = manifests.read_header(file)
    if xxhash.xxh3_128_hexdigest(header) != entry.header_xxh3_128:
        raise _bad(file, "header", "is damaged or of another save: its hash does not match")
    if file.tensors.keys() != entry.pieces.keys():
        odd = sorted(file.tensors.keys() ^ entry.pieces.keys())[0]
        raise _bad(file, f"tensor {odd}", "is in only one of file and manifest")
    for name, piece in entry.pieces.items():
        stored, whole = file.tensors[name], census[name]
        shape = (piece.num_rows, *whole.shape[1:])
        if (stored.shape, stored.dtype, stored.start) != (shape, whole.torch_dtype, piece.start):
            raise _bad(file, f"tensor {name}", f"must be {whole.dtype} {list(shape)}")
    # torch's reader believes these offsets, so they must be the manifest's.
    sharding = file.metadata.get(SHARDING_KEY)
    dims = {name: len(census[name].shape) for name in entry.pieces}
    offsets = {n: [p.first_row] + [0] * (dims[n] - 1) for n, p in entry.pieces.items()}
    wanted = {name: {OFFSETS_KEY: found} for name, found in offsets.items()}
    if sharding is None:
        is_equal = not any(piece.first_row for piece in entry.pieces.values())
    else:
        is_equal = parse_object(sharding.encode(), f"{file.name} {SHARDING_KEY}") == wanted
    if not is_equal:
        raise _bad(file, SHARDING_KEY, "gives its tensors other rows than the manifest")


def check_piece(folder: Path, name: str, tensor: str, piece: Piece, num_bytes: int) -> None:
    """Compare a tensor's bytes on disk with their hash. Raises CheckpointError."""
    if _hash(folder, name, piece.start, num_bytes) != piece.xxh3_128:
        raise CheckpointError(line(f"{folder}/{name}", tensor, "its bytes are damaged", REMEDY))


def check_attachment(folder: Path, name: str, attached: Attachment) -> None:
    """Compare an attached file with the manifest. Raises CheckpointError."""
    where = folder.joinpath(name)
    size = os.lstat(where).st_size
    if size != attached.size_bytes:
        rule = f"must be {attached.size_bytes}"
        raise CheckpointError(line(f"{folder}/{name}", f"{size} bytes", rule, REMEDY))
    if _hash(where.parent, where.name, 0, size) != attached.xxh3_128:
        raise CheckpointError(line(f"{folder}", name, "its bytes are damaged", REMEDY))


def _look(folder: Path, run_id: str | None) -> Manifest:
    # Names and kinds of all that lies in the folder, before anything but the manifest is opened.
    if not folder.is_dir():
        raise CheckpointError(line(f"{folder.parent}", folder.name, "is no folder", REMEDY))
    manifest = manifests.read(folder)
    if run_id is not None and manifest.run_id != run_id:
        raise OtherRun(line(f"{folder} run", manifest.run_id, f"is not run {run_id}", REMEDY))
    wanted = {manifests.FILE, *manifest.files, *manifest.attachments}
    found = {}
    for name, mode in _walk(folder):
        if not stat.S_ISREG(mode):
            raise CheckpointError(line(f"{folder}", name, "is a link or no file", REMEDY))
        found[name] = mode
    for name in sorted(wanted ^ found.keys()):
        rule = "is missing" if name in wanted else "is not in the manifest"
        raise CheckpointError(line(f"{folder}", name, rule, REMEDY))
    return manifest


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    for entry in os.scandir(folder):
        mode = entry.stat(follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            yield entry.name, mode
            continue
        inside = list(os.scandir(entry.path))
        for deep in inside:
            yield f"{entry.name}/{deep.name}", deep.stat(follow_symlinks=False).st_mode
        if not inside:
            yield entry.name, mode


def _check_share(folder: Path, manifest: Manifest, rank: int, world: int) -> None:
    for name, entry in sorted(manifest.files.items())[rank::world]:
        check_header(SafetensorsFile(folder, name), entry, manifest.census)
    for name, attached in sorted(manifest.attachments.items())[rank::world]:
        check_attachment(folder, name, attached)
    # Largest first, dealt out in turn: no rank has much more to read than another.
    for num_bytes, name, tensor in sorted(_sizes(manifest), reverse=True)[rank::world]:
        check_piece(folder, name, tensor, manifest.files[name].pieces[tensor], num_bytes)


def _sizes(manifest: Manifest) -> Iterator[tuple[int, str, str]]:
    for name, file in manifest.files.items():
        for tensor, piece in file.pieces.items():
            yield piece.num_rows * manifest.census[tensor].row_bytes, name, tensor


@contextlib.contextmanager
def _read_errors(folder: Path) -> Iterator[None]:
    # A disk that cannot read a checkpoint makes it bad: the one before it may be readable.
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        raise CheckpointError(line(f"{folder}", found, "cannot be read", REMEDY)) from error


def _hash(folder: Path, name: str, start: int, num_bytes: int) -> str:
    state, block = xxhash.xxh3_128(), memoryview(bytearray(min(BLOCK_BYTES, num_bytes)))
    with open_file(folder, name) as descriptor:
        for position in range(start, start + num_bytes, BLOCK_BYTES):
            part = block[: min(BLOCK_BYTES, start + num_bytes - position)]
            pread_into(descriptor, part, position, name)
            state.update(part)
    return state.hexdigest()


def _bad(file: SafetensorsFile, what: str, rule: str) -> CheckpointError:
    return CheckpointError(line(f"{file.folder}/{file.name}", what, rule, REMEDY))
