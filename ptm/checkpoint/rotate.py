"""Which checkpoints may go when a new one is good.

Only folders whose manifest is sound and names this run are ever deleted. Of these stay: the one
just saved (it was read back from disk), the newest `keep` by step, and the best. The best is the
newest that was saved as best, so no pointer file can be out of date. Deletion is a rename first:
a kill never leaves half a checkpoint under its name.
"""

from __future__ import annotations

from pathlib import Path

from ptm.checkpoint import manifest as manifests
from ptm.checkpoint.folders import remove, step_folders
from ptm.common.errors import CheckpointError


def best(root: Path, *, run_id: str) -> Path | None:
    """The checkpoint of this run with the best held-out loss, if one was saved as best."""
    return next((folder for _, folder, is_best in _own(root, run_id) if is_best), None)


def rotate(root: Path, *, run_id: str, keep: int, keep_best: bool, newest: Path) -> list[str]:
    """Delete what need not stay, oldest first; returns the names deleted. Raises OSError."""
    own = _own(root, run_id)
    kept = {newest, *(folder for _, folder, _ in own[:keep])}
    if keep_best:
        kept |= {folder for folder in [best(root, run_id=run_id)] if folder}
    gone = [folder for _, folder, _ in reversed(own) if folder not in kept]
    for folder in gone:
        remove(folder)
    return [folder.name for folder in gone]


def _own(root: Path, run_id: str) -> list[tuple[int, Path, bool]]:
    found = []
    for step, folder in step_folders(root):
        try:
            manifest = manifests.read(folder)
        except CheckpointError:
            continue  # not known to be ours, so it stays
        if manifest.run_id == run_id and manifest.step == step:
            found.append((step, folder, manifest.is_best))
    return found
