"""Settings of checkpoints: how often, how many are kept, and how long a rank waits for the others."""

from __future__ import annotations

from ptm.common.config import config, ranged


@config
class CheckpointConfig:
    interval: int = ranged(1000, least=1)
    "Steps between two checkpoints; one more is written at the last step and when the run is asked to stop."
    keep: int = ranged(3, least=1)
    "Newest checkpoints of this run that stay on disk; older ones are deleted after a new one is good."
    keep_best: bool = True
    "Keep the checkpoint with the best held-out loss too, whatever its age."
    background: bool = True
    "Write while training goes on, from a copy in host memory (12 bytes a parameter over all ranks); false waits."
    timeout_s: int = ranged(1800, least=5, most=86_400)
    "How long a rank waits for the others while saving or loading before it gives up."
