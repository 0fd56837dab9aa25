"""How fast one rank of a machine is: read from a description, or measured (ptm/planner/probe.py).

    speed:
      bf16: {dense: 690e12, experts: 560e12, attention: 400e12, head: 690e12}    # FLOP/s
      memory: 4.3e12          # bytes a second, copying
      link: 370e9             # bytes a second that a rank sends to ranks of its machine
      network: 50e9           # and to ranks of other machines
      latency: 20e-6          # seconds of a collective beside its bytes
      adam: 130e9             # parameters a second, states in device memory
      host: 50e9              # bytes a second between device and host
      host_adam: 0.9e9        # parameters a second, states in host memory
      ssd_read: 0.8e9         # bytes a second of this rank's share of the disk
      ssd_write: 0.8e9

Every number is of one rank while all ranks of its machine work. `fp32` may stand beside `bf16`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptm.common.errors import RecipeError, line

WORK = ("dense", "experts", "attention", "head")
"""Kinds of work with a rate of their own: projections and filters, expert products, attention
scores, the vocabulary."""
_RATES = (
    "memory", "link", "network", "latency", "adam", "host", "host_adam", "ssd_read", "ssd_write",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Seconds of one micro-batch of a job on this machine, forward and backward."""

    tokens: int
    "Of the micro-batch; another size is taken as proportional."
    block_forward_s: float
    block_backward_s: float
    root_forward_s: float
    root_backward_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    flops_per_s: Mapping[str, Mapping[str, float]]
    """precision -> kind of work -> FLOP/s; fp32 is taken as a sixteenth of bf16 where it is not
    said."""
    memory: float
    link: float
    network: float
    latency: float
    adam: float
    host: float
    host_adam: float
    ssd_read: float
    ssd_write: float
    slowdown: float = 1.0
    """How much longer work takes because ranks share cores."""
    is_measured: bool = False
    """Measured on this machine: another number at another time."""
    timed: Timed | None = field(default=None)
    """The job itself, timed; then no rate of computing is used."""

    def rate(self, precision: str, kind: str) -> float:
        if precision in self.flops_per_s:
            return self.flops_per_s[precision][kind]
        return self.flops_per_s["bf16"][kind] / 16


def parse_speed(keys: Any) -> Speed:
    """The `speed` section of a description. Raises RecipeError naming the key."""
    known = {"bf16", "fp32", *_RATES}
    wanted = ("bf16", *_RATES)
    if not isinstance(keys, dict) or set(keys) - known or set(wanted) - set(keys):
        found = ", ".join(map(str, keys)) if isinstance(keys, dict) else type(keys).__name__
        rule = f"must have the keys {', '.join(wanted)}"
        raise RecipeError(line("hardware.speed", "", rule, f"it has: {found}"))
    flops = {}
    for precision in ("bf16", "fp32"):
        if precision not in keys:
            continue
        rates = keys[precision]
        if not isinstance(rates, dict) or set(rates) != set(WORK):
            rule = f"must have the keys {', '.join(WORK)}"
            raise RecipeError(line(f"hardware.speed.{precision}", rates, rule, "mend it"))
        flops[precision] = {kind: _number(f"{precision}.{kind}", rates[kind]) for kind in WORK}
    rates: dict[str, Any] = {name: _number(name, keys[name]) for name in _RATES}
    return Speed(flops_per_s=flops, **rates)


def _number(key: str, value: Any) -> float:
    # YAML 1.1 reads 4.3e12 as a string, because the sign of the exponent is missing.
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 < number < 1e18:
        rule = "must be a number above 0"
        raise RecipeError(line(f"hardware.speed.{key}", value, rule, "write it like 4.3e12"))
    return number
