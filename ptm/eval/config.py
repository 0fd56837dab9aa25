"""Settings of evaluation on held-out text."""

from __future__ import annotations

from ptm.common.config import config, ranged


@config
class EvalConfig:
    interval: int = ranged(1000, least=0)
    "Steps between evaluations during training; 0 evaluates only at the end."
    rows: int = ranged(64, least=1)
    "Held-out rows of seq_len tokens in an evaluation during training."
