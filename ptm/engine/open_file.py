"""Which page file a rank goes on with, and at which step: decided by all ranks together.

Each rank says which steps it can be restored to; the newest that all of them have is taken. What
stands in the way is told in one line and never overwritten in silence:

    a record is torn or damaged     the one before is taken
    a page was found damaged        the run that found it left a mark (rank-00003.damaged); every
                                    page is now read, and a step of which all are whole is taken
    no step is left that all have   all files are set aside (rank-00003.pages.bad), and the run goes
                                    on from its newest good checkpoint; without one it is refused
    pages of other settings         refused, unless a checkpoint is as new as they are

A rank without a commit beside ranks with their first one is a run that was killed in between: it
begins anew.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ptm.common.errors import CheckpointError, StorageError
from ptm.engine.commit import PageReader
from ptm.engine.disk import disk_errors, path_line, sync_folder
from ptm.engine.record import Identity, RecordLog, rank_file, refuse_another
from ptm.engine.tier import SsdTier, damage_mark
from ptm.mesh.peers import Peers

KINDS = ("record-a", "record-b", "pages")


class Opened(NamedTuple):
    ssd: SsdTier
    step: int | None
    "The step to restore; None for pages of zeros."
    notes: list[str]
    "What is to be said to people, a line each."


class Seen(NamedTuple):
    """What one rank has on its disk."""

    steps: list[int]
    "Steps that can be restored, as far as is known without reading pages."
    lost: list[str]
    "A line for each thing that is there and cannot be used."
    is_marked: bool
    "A page was found damaged."
    other: str
    "Why the files are of other settings, if they are."
    has_file: bool


def open_file(
    ssd_path: str,
    identity: Identity,
    *,
    peers: Peers,
    describe: Callable[[int], str],
    newest_checkpoint: Callable[[], int | None],
) -> Opened:
    """This rank's page file. `newest_checkpoint()`, called on all ranks or none, is the step of a
    checkpoint that can be used instead. Raises CheckpointError, StorageError on all ranks alike."""
    seen = [Seen(*row) for row in peers.together(lambda: list(look(ssd_path, identity)))]
    notes = [text for rank in seen for text in rank.lost]
    if any(rank.is_marked for rank in seen):
        found = peers.together(lambda: list(_whole_steps(ssd_path, identity, describe)))
        seen = [rank._replace(steps=steps) for rank, (steps, _) in zip(seen, found)]
        notes += [text for _, texts in found for text in texts]
    common = set(seen[0].steps).intersection(*(rank.steps for rank in seen[1:]))
    others = [rank for rank in seen if rank.other]
    if others:
        notes += _instead_of_others(others, newest_checkpoint())
        common = set()
    elif not common and not _is_new(seen):
        notes += _give_up(identity.file(ssd_path, "pages").parent, seen, notes, newest_checkpoint())
        peers.together(lambda: set_aside(ssd_path, identity))
    opened: list[SsdTier] = []

    def open_one() -> None:
        if common:
            opened.append(SsdTier.open_existing(ssd_path, identity))
        else:
            opened.append(SsdTier.create(ssd_path, identity, replace=True))
        damage_mark(identity.file(ssd_path, "pages")).unlink(missing_ok=True)

    try:
        peers.together(open_one)
    except BaseException:
        for ssd in opened:
            ssd.close()
        raise
    return Opened(opened[0], max(common, default=None), notes)


def look(ssd_path: str, identity: Identity) -> Seen:
    """Raises CheckpointError for records in another format, StorageError."""
    path = identity.file(ssd_path, "pages")
    log = RecordLog(ssd_path, run_id=identity.run_id, rank=identity.rank)
    records = log.read()
    lost, steps, other = list(log.damaged), [record.step for record in records], ""
    size = path.stat().st_size if path.is_file() else None
    for record in records:
        try:
            refuse_another(record.identity, identity, path)
        except CheckpointError as error:
            other = str(error)
    if steps and not other and size != identity.file_bytes:
        rule = "is gone" if size is None else f"is {size} bytes long, not {identity.file_bytes}"
        lost.append(path_line(path, rule, "look at who changed it"))
        steps = []
    return Seen(steps, lost, damage_mark(path).exists(), other, size == identity.file_bytes)


def _whole_steps(
    ssd_path: str, identity: Identity, describe: Callable[[int], str]
) -> tuple[list[int], list[str]]:
    """Steps of which every page is what was written, and a line for each that has other pages."""
    steps, lost = [], []
    for step in look(ssd_path, identity).steps:
        try:
            verify(ssd_path, identity.run_id, identity.rank, step, describe)
            steps.append(step)
        except (CheckpointError, StorageError) as error:
            lost.append(f"step {step} cannot be used: {error}")
    return steps, lost


def verify(
    ssd_path: str,
    run_id: str,
    rank: int,
    step: int,
    describe: Callable[[int], str] = lambda page: f"page {page}",
) -> None:
    """Read every page of a step. Raises CheckpointError, StorageError."""
    reader = PageReader(ssd_path, run_id=run_id, rank=rank, step=step, describe=describe)
    try:
        reader.verify()
    finally:
        reader.close()


def _is_new(seen: list[Seen]) -> bool:
    """Whether nothing was committed by all ranks yet, so that nothing is lost by a new file."""
    if any(rank.lost or rank.is_marked for rank in seen):
        return False
    if not any(rank.steps for rank in seen):
        return True
    return all(rank.has_file and len(rank.steps) <= 1 for rank in seen) and any(
        not rank.steps for rank in seen
    )


def _give_up(folder: Path, seen: list[Seen], notes: list[str], instead: int | None) -> list[str]:
    """What is said when no step is left that all ranks have. Raises CheckpointError if there is
    nothing to go on from instead."""
    if not notes:
        there = ", ".join(f"rank {i}: {_steps(rank.steps)}" for i, rank in enumerate(seen))
        notes = [path_line(folder, f"ranks have no step in common ({there})", "")[:-2]]
    if instead is None:
        rule = "cannot be used, and there is no checkpoint to go on from: " + " | ".join(notes)
        remedy = "put the files back as they were, or delete this folder to begin anew"
        raise CheckpointError(path_line(folder, rule, remedy))
    rule = (
        f"cannot be used and is set aside (*.bad); going back to the checkpoint of step {instead}"
    )
    return [*notes, path_line(folder, rule, "delete it once it was looked at")]


def _steps(steps: list[int]) -> str:
    return " and ".join(map(str, steps)) or "none"


def _instead_of_others(others: list[Seen], instead: int | None) -> list[str]:
    newest = max(step for rank in others for step in rank.steps)
    if instead is None or instead < newest:
        raise CheckpointError(others[0].other)
    why = others[0].other.rpartition("; ")[0]
    return [f"{why}; written anew, as the checkpoint of step {instead} is as new"]


def set_aside(ssd_path: str | Path, identity: Identity) -> None:
    """Give this rank's files names that nothing reads. Raises StorageError."""
    for kind in KINDS:
        path = identity.file(ssd_path, kind)
        if path.exists():
            with disk_errors(path, "renamed"):
                os.replace(path, path.with_name(path.name + ".bad"))
    with contextlib.suppress(FileNotFoundError):
        sync_folder(identity.file(ssd_path, "pages").parent)


def folder_name(run_id: str, world: int, ep: int) -> str:
    return f"{run_id}.n{world}e{ep}"


def folders_of(ssd_path: str | Path, run_id: str) -> list[tuple[Path, int, int]]:
    """(folder, ranks, ep) of all layouts in which this run has page files."""
    found = []
    for folder in sorted(Path(ssd_path).glob(f"{run_id}.n*e*")):
        named = re.fullmatch(r"n(\d+)e(\d+)", folder.name.removeprefix(f"{run_id}."))
        if named:
            found.append((folder, int(named[1]), int(named[2])))
    return found


def has_commits(ssd_path: str | Path, run_id: str) -> bool:
    """Whether any rank of this run has committed anything here, whole or not."""
    return any(
        record.stat().st_size
        for folder, _, _ in folders_of(ssd_path, run_id)
        for record in folder.glob("rank-*.record-?")
    )


def newest_of_layout(ssd_path: str, folder: str, world: int) -> tuple[int, dict[str, Any]] | None:
    """The newest step, and its meta, that all ranks of a layout have; whole ones only, where a page
    was found damaged. None where there is none."""
    metas: dict[int, dict[str, Any]] = {}
    common: set[int] | None = None
    for rank in range(world):
        steps = {}
        is_marked = damage_mark(rank_file(ssd_path, folder, rank, "pages")).exists()
        for record in PageReader.records(ssd_path, run_id=folder, rank=rank):
            with contextlib.suppress(CheckpointError, StorageError):
                if is_marked:
                    verify(ssd_path, folder, rank, record.step)
                steps[record.step] = record.meta
        metas = metas or steps
        common = set(steps) if common is None else common & set(steps)
    return (max(common), metas[max(common)]) if common else None


def lost_layouts(ssd_path: str, run_id: str, *, besides: str) -> list[str]:
    """A line for each other layout of the run that all its ranks had a commit of, or a damaged page
    in, and no step is left of."""
    lost = []
    for folder, world, _ in folders_of(ssd_path, run_id):
        if folder.name == besides or newest_of_layout(ssd_path, folder.name, world) is not None:
            continue
        counts = [
            len(PageReader.records(ssd_path, run_id=folder.name, rank=rank))
            for rank in range(world)
        ]
        marks = [mark.read_text().strip() for mark in sorted(folder.glob("rank-*.damaged"))]
        if marks or max(counts) > 1:
            lost += marks or [path_line(folder, "its ranks have no step in common", "look at it")]
    return lost


def forget_other_layouts(folder: Path) -> None:
    """Remove page files of the same run that other layouts left, after a commit to `folder`. What
    was set aside stays."""
    run_id = folder.name.rpartition(".n")[0]
    for other, _, _ in folders_of(folder.parent, run_id):
        if other != folder and not any(other.glob("*.bad")):
            shutil.rmtree(other, ignore_errors=True)
