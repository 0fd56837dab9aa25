"""What is this folder? A checkpoint, a run, or a published model, opened as a model either way.

A checkpoint has manifest.json and is verified, every byte of it, before a weight is used. A run has
checkpoints/, of which the newest good one is taken. A published folder has config.json; it comes
without hashes, so its names, shapes and sizes are all that can be checked.
"""

from __future__ import annotations

from pathlib import Path

from ptm.checkpoint import hf_config, manifest
from ptm.checkpoint.hf import Opened, open_hf
from ptm.checkpoint.load import newest_good
from ptm.checkpoint.verify import verify
from ptm.checkpoint.weights import open_checkpoint
from ptm.common.errors import CheckpointError, line


def open_model(folder: Path) -> Opened:
    """What a model folder holds, its weights unread. Raises CheckpointError."""
    if (folder / manifest.FILE).exists():
        found = verify(folder)
    elif (folder / "checkpoints").is_dir():
        found = newest_good(folder / "checkpoints")
        if found is None:
            raise CheckpointError(line("run", folder, "has no checkpoint yet", "let it save one"))
    elif (folder / hf_config.FILE).exists():
        return open_hf(folder)
    else:
        rule = "has no manifest.json, checkpoints or config.json"
        raise CheckpointError(line("folder", folder, rule, "name a run, checkpoint or model"))
    notes = tuple(reason for _, reason in found.rejected)
    return open_checkpoint(found.folder, found.manifest)._replace(notes=notes)
