"""Settings of the engine that owns parameters, gradients and optimizer states."""

from __future__ import annotations

from ptm.common.config import Choice, config, ranged


class EngineKind(Choice):
    zero1 = "zero1"


@config
class EngineConfig:
    kind: EngineKind = EngineKind.zero1
    """zero1: every rank holds weights and gradients, master weights and moments are sharded over
    the ranks."""
    bucket_mib: int = ranged(32, least=1, most=65_536)
    """Parameters are exchanged in groups of about this size (MiB of fp32 gradients); a larger one
    travels alone."""
    timeout_s: int = ranged(600, least=5, most=86_400)
    "How long a rank waits for its peers before it says which one is missing and leaves."
