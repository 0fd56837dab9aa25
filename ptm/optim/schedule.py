"""Learning-rate curves: pure functions of the step."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, steps: int, peak: float, floor: float, warmup_steps: int, is_cosine: bool
) -> float:
    """Rate of update `step` (0 is the first): linear from peak/warmup_steps, then cosine to
    `floor`, or constant."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if not is_cosine:
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
