"""Loading: find the newest checkpoint that is good, and put it into tensors on any number of ranks.

`newest_good` goes from the newest step down and verifies each whole before anything is used. One
that is damaged is named and stepped over; with `repair` (the process that trains) it is renamed to
.bad once a good one is found, so that the next start does not read it again. If there are folders
and none is good, that is an error and nothing is renamed: starting from scratch by accident would
be worse. A folder of a newer format is an error too.

`load` has each rank read the rows it needs, from whatever ranks wrote them, one tensor at a time.
It reads with our own reader and not with torch DCP's, which fills tensors that are all in memory,
casts in silence and ignores what is left over. Names, shapes and dtypes are compared before the
first row is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ptm.checkpoint import manifest as manifests
from ptm.checkpoint.folders import clean, disk_errors, set_aside, step_folder, step_folders
from ptm.checkpoint.manifest import MODEL, TRAINING, Manifest, NewerFormat
from ptm.checkpoint.rows import as_rows, entry, is_stored_as
from ptm.checkpoint.source import FolderSource, TensorSource, read_rows
from ptm.checkpoint.verify import Good, OtherRun, verify
from ptm.common.errors import CheckpointError, line
from ptm.engine.state import StateRows
from ptm.mesh.peers import Peers


def newest_good(
    root: Path, *, peers: Peers | None = None, run_id: str | None = None, repair: bool = False
) -> Good | None:
    """The newest verified checkpoint in `root`, or None where no folder is named like one.

    With `run_id`, those of other runs are not looked at. `repair` is for the process that will save
    here, before it makes its Saver: it finishes what a killed save left, and renames damaged ones.
    Raises: CheckpointError when there are some and none is good; NewerFormat.
    """
    peers = peers or Peers()
    names = peers.together(lambda: _names(root, repair) if peers.rank == 0 else None)[0]
    rejected: dict[Path, str] = {}
    damaged: list[Path] = []
    for folder in (root / name for name in names):
        try:
            good = verify(folder, peers, run_id=run_id)
        except NewerFormat:
            raise
        except CheckpointError as error:
            rejected[folder] = str(error)
            if not isinstance(error, OtherRun):
                damaged.append(folder)
            continue
        if folder != step_folder(root, good.manifest.step):
            rejected[folder] = f"{folder.name} was renamed: it holds step {good.manifest.step}"
            continue
        if repair:
            peers.together(lambda: _set_aside(damaged) if peers.rank == 0 else None)
        return good._replace(rejected=tuple(rejected.items()))
    if not rejected:
        return None
    rule = "none is good: " + " | ".join(rejected.values())
    remedy = "restore one of them, or begin a new run in another run.dir"
    raise CheckpointError(line(f"{root}", f"{len(rejected)} checkpoints", rule, remedy))


def load(
    good: Good,
    state: Mapping[str, StateRows | Tensor],
    *,
    peers: Peers | None = None,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Fill `state` from a verified checkpoint, on any number of ranks; returns its meta.

    Shapes and dtypes: of the manifest exactly, save that stacked matrices may be (E, R, C) in one
    and (E x R, C) in the other. Values as in `Saver.save`; ranks may overlap or leave rows out.
    weights_only: only `model.*`, from a checkpoint of either kind, and floats are cast to the
    dtype of `state`. Raises: CheckpointError before anything is changed; HangError.
    """
    peers = peers or Peers()
    rows = as_rows(state)
    if weights_only:
        rows = {name: value for name, value in rows.items() if name.startswith(MODEL)}
    check_fit(good.folder, good.manifest, rows, weights_only=weights_only)
    peers.together(lambda: _fill(rows, FolderSource(good.folder, list(good.manifest.files))))
    return good.manifest.meta


def load_weights(source: TensorSource, state: Mapping[str, StateRows | Tensor]) -> None:
    """Fill the `model.*` of `state` from an opened model, whose shapes `check_shapes` has compared;
    floats are cast."""
    rows = as_rows(state)
    names = {name.removeprefix(MODEL): name for name in rows if name.startswith(MODEL)}
    _fill({short: rows[name] for short, name in names.items()}, source)


def _fill(state: Mapping[str, StateRows], source: TensorSource) -> None:
    for name, rows in state.items():
        if rows.num_rows:
            rows.write(read_rows(source, name, rows).to(rows.dtype))


def check_fit(
    folder: Path, manifest: Manifest, state: Mapping[str, StateRows], *, weights_only: bool
) -> None:
    """Raise CheckpointError unless `state` is exactly what the checkpoint holds."""
    if manifest.holds != TRAINING and not weights_only:
        rule = "has no optimizer states"
        remedy = "start from it with train.init_from"
        raise CheckpointError(line(f"{folder}", manifest.holds, rule, remedy))
    census = manifest.census
    if weights_only:
        census = {name: entry for name, entry in census.items() if name.startswith(MODEL)}
    for name in sorted(census.keys() ^ state.keys()):
        rule = "is in the checkpoint" if name in census else "is in the model"
        remedy = "load it into the model that it was saved from"
        raise CheckpointError(line(f"{folder} tensor", name, f"{rule} only", remedy))
    for name, rows in state.items():
        wanted, has = entry(rows), census[name]
        is_float = wanted.torch_dtype.is_floating_point and has.torch_dtype.is_floating_point
        is_dtype = has.dtype == wanted.dtype or (weights_only and is_float)
        if not is_stored_as(has.shape, wanted.shape) or not is_dtype:
            rule = f"is {has.dtype} {list(has.shape)}, the model has {wanted.dtype}"
            rule += f" {list(wanted.shape)}"
            raise CheckpointError(
                line(f"{folder} tensor", name, rule, "use the model section it was saved with")
            )


def _names(root: Path, repair: bool) -> list[str]:
    with disk_errors(root):
        if repair:
            clean(root)
        return [folder.name for _, folder in step_folders(root)]


def _set_aside(damaged: list[Path]) -> None:
    # What has no manifest at all may never have been a checkpoint of ours, and keeps its name.
    for folder in damaged:
        with disk_errors(folder):
            if os.path.lexists(folder / manifests.FILE):
                set_aside(folder, "bad")
