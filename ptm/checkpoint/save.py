"""Saving: a checkpoint is there whole, read back and named, or it is not there at all.

    caller's thread   1 wait for the save before     2 copy this rank's rows to host memory
    saver's thread    3 the ranks tell each other what they have, check that every row is there once
                      4 the same step of this run, same content, already there and good: done
                      5 torch DCP writes step-N.tmp-<uuid>, hashed on the way, fsynced
                      6 every rank drops its files from the page cache, reads them back, compares
                      7 rank 0: attachments, manifest, fsync, rename to step-N, fsync, rotation

Nothing is ever written into a folder named step-N. A step that is there with other content (the
run went back and came again) is replaced by two renames; see folders.py. What stands in the way
and is damaged, or of another run, is renamed and kept.

A save that is not in the background leaves out the copy and has the caller wait: rows are read one
tensor at a time, as they are written, so states larger than memory can be saved.

Ranks meet in `Peers.together` and in DCP, on a gloo group of their own, so a failure on one is
raised on all: StorageError (74) for the disk, CheckpointError (4) for a state that does not add
up, HangError (70) when a peer is gone or late. Rank 0 removes the temporary folder; should that be
the one to die, the next start does. Errors of the saver's thread come up in the next `save` or
`wait`. Memory: the copy, if there is one, and one tensor's rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ptm.checkpoint import manifest as manifests
from ptm.checkpoint.commit import attach, check_room, commit, drop_cache, read_back_errors
from ptm.checkpoint.config import CheckpointConfig
from ptm.checkpoint.dcp_writer import RowsPlanner, ShardWriter, plan_files
from ptm.checkpoint.folders import disk_errors, step_folder, storage_error
from ptm.checkpoint.manifest import Entry, Manifest, Piece, ShardFile
from ptm.checkpoint.rotate import rotate
from ptm.checkpoint.rows import as_rows, digest, entry, settle
from ptm.checkpoint.safetensors_file import SafetensorsFile
from ptm.checkpoint.snapshot import Snapshot
from ptm.checkpoint.verify import check_piece, verify
from ptm.common.errors import CheckpointError, PtmError, line
from ptm.engine.state import StateRows
from ptm.mesh.peers import Peers, lost


class Saved(NamedTuple):
    """What a save came to. `is_new` is False when the same checkpoint was there already."""

    folder: Path
    step: int
    num_bytes: int
    blocked_s: float
    took_s: float
    is_new: bool
    notes: list[str]


class Job(NamedTuple):
    """One save; its rows are a copy, or live while the caller waits."""

    folder: Path
    step: int
    rows: dict[str, StateRows]
    meta: dict[str, Any]
    attachments: dict[str, Path]
    is_best: bool


class Saver:
    """Writes the checkpoints of one run into `root`. Life: make -> [prepare] -> save* -> close.

    Every rank makes one and makes the same calls in the same order. `peers` belongs to it until
    `close`. `on_saved` hears of each finished save, on the saver's thread of every rank. With
    `stream` no save is in the background, whatever the config says: for states that memory holds
    no second time. `writer`: a test may pass one on a disk that fails.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        *,
        run_id: str,
        peers: Peers | None = None,
        on_saved: Callable[[Saved], None] = lambda saved: None,
        stream: bool = False,
        writer: Callable[[Path, dict[str, int]], ShardWriter] = ShardWriter,
    ) -> None:
        self.root, self.config, self.run_id = root, config, run_id
        self.peers = peers or Peers()
        self.is_background = config.background and not stream
        self._is_main = self.peers.rank == 0
        self._on_saved, self._writer = on_saved, writer
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ptm-save")
        self._running: Future[Saved] | None = None

    def prepare(self, state: Mapping[str, StateRows | Tensor]) -> None:
        """Allocate the memory of the copies now, for a first save as short as others."""
        if self.is_background:
            self._snapshot.prepare(as_rows(state))

    def save(
        self,
        state: Mapping[str, StateRows | Tensor],
        *,
        step: int,
        meta: dict[str, Any],
        attachments: Mapping[str, Path] | None = None,
        expected: set[str] | None = None,
        is_best: bool = False,
        block: bool = False,
    ) -> Saved | None:
        """Save `state` as of now; returns when it is copied, or, with `block` and where nothing is
        copied, when it is on disk. Each value gives the rows that this rank has, if any.

        `attachments`: name in the checkpoint -> a file, or a folder of files. `expected`: the names
        that the live model and optimizer have; a state with more or fewer is refused.
        Raises: the error of the save before; CheckpointError. With `block` this save's own errors.
        """
        self.wait()
        started = time.perf_counter()
        _check_names(state.keys(), expected)
        is_background = self.is_background and not block
        rows = as_rows(state)
        if is_background:
            rows = self._snapshot.copy(rows)
        else:
            settle(rows)
        job = Job(
            folder=step_folder(self.root, step),
            step=step,
            rows=rows,
            meta=json.loads(json.dumps(meta, allow_nan=False)),
            attachments=dict(attachments or {}),
            is_best=is_best,
        )
        blocked_s = time.perf_counter() - started
        self._running = self._thread.submit(self._run, job, started, blocked_s)
        return None if is_background else self.wait()

    def wait(self) -> Saved | None:
        """Wait for the save in progress, if any. Raises its error, once."""
        running, self._running = self._running, None
        return running.result() if running else None

    def close(self) -> None:
        """Wait, and end the thread. Raises the error of the save in progress."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _run(self, job: Job, started: float, blocked_s: float) -> Saved:
        try:
            manifest, notes = self._save(job)
        except CheckpointException as error:  # torch's, a BaseException: rank -> (error, trace)
            rank, (cause, _) = min(error.failures.items())
            if isinstance(cause, OSError):
                raise storage_error(job.folder, cause) from cause
            if isinstance(cause, PtmError):  # of whoever reads the rows
                raise cause from error
            raise PtmError(f"{job.folder}: rank {rank} failed to write: {cause!r}") from error
        except PtmError:
            raise
        except OSError as error:
            raise storage_error(job.folder, error) from error
        saved = Saved(
            folder=job.folder,
            step=job.step,
            num_bytes=manifest.num_bytes,
            blocked_s=blocked_s,
            took_s=time.perf_counter() - started,
            is_new=notes is not None,
            notes=notes or [],
        )
        self._on_saved(saved)
        return saved

    def _save(self, job: Job) -> tuple[Manifest, list[str] | None]:
        census = self._census(job)
        if same := self._there_already(job, census):
            return same, None
        tmp = job.folder.with_name(
            self.peers.together(lambda: self._begin(job, census) if self._is_main else None)[0]
        )
        try:
            digests = self._write(job, tmp, census)
            heard = self.peers.together(lambda: self._read_back(tmp, job, census, digests))
            attached = self.peers.together(
                lambda: attach(tmp, job.attachments) if self._is_main else None
            )[0]
            manifest = self._manifest(job, census, heard, attached)
            notes = self.peers.together(
                lambda: commit(tmp, job.folder, manifest) if self._is_main else None
            )[0]
        except BaseException:
            if self._is_main:
                shutil.rmtree(tmp, ignore_errors=True)
            raise
        if self._is_main:
            notes += self._rotate(job.folder)
        return manifest, notes

    def _census(self, job: Job) -> dict[str, Entry]:
        """What all ranks hold together. Raises CheckpointError unless that is every row once."""
        heard = self.peers.gather(
            {
                "step": job.step,
                "census": {n: [list(r.shape), entry(r).dtype] for n, r in job.rows.items()},
                "ranges": {n: [r.first_row, r.num_rows] for n, r in job.rows.items() if r.num_rows},
            }
        )
        for rank, other in enumerate(heard):
            if (other["step"], other["census"]) != (heard[0]["step"], heard[0]["census"]):
                rule = "differs from rank 0's in step, names, shapes or dtypes"
                raise CheckpointError(
                    line("state of rank", rank, rule, "save on all ranks at once")
                )
        census = {name: entry(rows) for name, rows in job.rows.items()}
        for name, whole in census.items():
            ranges = [tuple(h["ranges"][name]) for h in heard if name in h["ranges"]]
            manifests.check_cover(name, whole.shape[0], ranges)
        return census

    def _there_already(self, job: Job, census: dict[str, Entry]) -> Manifest | None:
        """The checkpoint with this step's name, if it is good and has just what would be saved."""

        def look() -> bool:
            with contextlib.suppress(CheckpointError):
                there = manifests.read(job.folder)
                mine = (self.run_id, job.meta, job.is_best, census)
                return mine == (there.run_id, there.meta, there.is_best, there.census)
            return False

        # Only then it is worth reading all rows for their hashes, here and on the disk.
        if not self.peers.together(lambda: self._is_main and look())[0]:
            return None
        try:
            there = verify(job.folder, self.peers).manifest
        except CheckpointError:
            return None
        return there if all(self.peers.together(lambda: _has_rows(there, job.rows))) else None

    def _begin(self, job: Job, census: dict[str, Entry]) -> str:
        """Rank 0: see that there is room, and name the temporary folder."""
        with disk_errors(job.folder):
            self.root.mkdir(parents=True, exist_ok=True)
        check_room(self.root, sum(e.shape[0] * e.row_bytes for e in census.values()))
        return f"{job.folder.name}.tmp-{uuid.uuid4().hex}"

    def _write(self, job: Job, tmp: Path, census: dict[str, Entry]) -> dict[str, str]:
        """Write this rank's files; the hashes of its rows as they were read."""
        writer = self._writer(tmp, plan_files(census, self.peers.world))
        try:
            dcp_save(
                {},
                storage_writer=writer,
                planner=RowsPlanner(job.rows),
                process_group=self.peers.group,
                no_dist=self.peers.group is None,
            )
        except RuntimeError as error:  # what a rank's own work raises comes as CheckpointException
            raise lost(error) from error
        return writer.digests

    def _read_back(
        self, tmp: Path, job: Job, census: dict[str, Entry], digests: dict[str, str]
    ) -> dict[str, ShardFile]:
        """This rank's files as the disk has them. Raises StorageError where that is not `job`."""
        prefix = f"shard-{self.peers.rank + 1:05d}-"
        found = {}
        for name in sorted(name for name in os.listdir(tmp) if name.startswith(prefix)):
            drop_cache(tmp / name)
            with read_back_errors(tmp):
                file = SafetensorsFile(tmp, name)
                mine = {t: (job.rows[t].first_row, digests.pop(t)) for t in file.tensors}
                found[name] = manifests.describe(file, mine)
                for tensor, piece in found[name].pieces.items():
                    num_bytes = piece.num_rows * census[tensor].row_bytes
                    check_piece(tmp, name, tensor, piece, num_bytes)
        assert not digests, f"{tmp}: not written by DCP: {sorted(digests)[:3]}"
        return found

    def _manifest(
        self, job: Job, census: dict[str, Entry], heard: list[Any], attached: dict[str, Any]
    ) -> Manifest:
        # What came from the ranks is JSON: named tuples arrive as lists.
        files = {
            name: ShardFile(*file)._replace(pieces={t: Piece(*p) for t, p in file[-1].items()})
            for rank_files in heard
            for name, file in rank_files.items()
        }
        return Manifest(
            step=job.step,
            run_id=self.run_id,
            world=self.peers.world,
            holds=manifests.TRAINING,
            census=census,
            files=files,
            attachments={name: manifests.Attachment(*row) for name, row in attached.items()},
            meta=job.meta,
            is_best=job.is_best,
        )

    def _rotate(self, newest: Path) -> list[str]:
        try:
            gone = rotate(
                self.root,
                run_id=self.run_id,
                keep=self.config.keep,
                keep_best=self.config.keep_best,
                newest=newest,
            )
        except OSError as error:  # the new checkpoint is good: say it and go on
            return [f"an old checkpoint stays: {storage_error(self.root, error)}"]
        return [f"deleted {name}" for name in gone]


def _check_names(names: Any, expected: set[str] | None) -> None:
    if expected is None:
        return
    for missing in sorted(expected - names):
        rule = "is in the live model or optimizer and not in the state"
        raise CheckpointError(line("tensor", missing, rule, "save all of it"))
    for extra in sorted(names - expected):
        rule = "is in the state and not in the live model or optimizer"
        raise CheckpointError(line("tensor", extra, rule, "save no more than that"))


def _has_rows(there: Manifest, state: Mapping[str, StateRows]) -> bool:
    pieces = {
        (name, piece.first_row, piece.num_rows): piece.xxh3_128
        for file in there.files.values()
        for name, piece in file.pieces.items()
    }
    mine = ((n, r) for n, r in state.items() if r.num_rows)
    return all(pieces.get((n, r.first_row, r.num_rows)) == digest(r) for n, r in mine)
