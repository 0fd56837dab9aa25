"""Settings of checkpoints: how often, how many are kept, and who waits for the disk."""

from __future__ import annotations

from ptm.common.config import config, ranged


@config
class CheckpointConfig:
    interval: int = ranged(1000, least=0)
    """Steps between two checkpoints; the last step, a new best and a request to stop save too.
    0 writes none, where engine.ssd_path keeps every step anyway."""
    keep: int = ranged(3, least=1)
    "Newest checkpoints of this run that stay; older ones go once a new one is good."
    keep_best: bool = True
    "Keep the checkpoint with the best held-out loss too, whatever its age."
    background: bool = True
    "Write while training goes on, from a copy in host memory (12 bytes a parameter); false waits."
