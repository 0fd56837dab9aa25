"""Settings of the optimizer."""

from __future__ import annotations

from ptm.common.config import Choice, config, ranged


class OptimKind(Choice):
    adamw = "adamw"


@config
class OptimConfig:
    kind: OptimKind = OptimKind.adamw
    "Update rule."
    beta1: float = ranged(0.9, least=0.0, below=1.0)
    "Decay of the first moment."
    beta2: float = ranged(0.95, least=0.0, below=1.0)
    "Decay of the second moment."
    eps: float = ranged(1e-8, above=0.0, most=1.0)
    "Added to the root of the second moment."
    weight_decay: float = ranged(0.1, least=0.0, most=1.0)
    "Decoupled weight decay of matrices; biases and norms have none."
