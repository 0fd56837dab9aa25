"""What a run folder says, read with suspicion: any file may be missing, torn, huge or wrong.

Numbers are kept only if they are numbers, text only up to a bound, and a line of metrics that is no
object with a step is counted and left out. Expert shares are averaged over at most `MOST_COLUMNS`
stretches of steps while reading, so that a long run needs no more memory than a short one: 24 bytes
a step and curve, and one small array for the shares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

MOST_COLUMNS = 200
_MOST_TEXT, _MOST_PICTURE = 200_000, 4_000_000
_MOST_LAYERS, _MOST_EXPERTS = 512, 4096

CURVES = (
    "loss",
    "eval_loss",
    "eval_bits_per_byte",
    "eval_perplexity",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "mfu",
    "memory_bytes",
    "step_s",
    "data_s",
    "compute_s",
    "communication_s",
    "skipped",
)

GROUPS = {
    "pages": ("reads", "writes", "read_bytes", "write_bytes", "waited_s"),
    "updates": ("waited_s", "guessed", "undone"),
    "commits": ("waited_s",),
}
"""Objects of a line, and what of them becomes the curve "object.key": zero where it is not said."""
LEVELS = {
    "tiers": ("gpu_bytes", "cpu_bytes", "ssd_bytes"),
    "updates": ("late_steps_mean", "late_steps_most"),
}
"""The same, unknown where it is not said."""
SENT = ("gather", "scatter_sum", "all_to_all", "others")
"""Curves "sent_bytes.name"; the last is the sum of all other collectives."""
_MOST_COLLECTIVES = 50


@dataclass
class ExpertLoad:
    """Shares of the experts over a run.

    Shapes: share_LCE (layers, columns, E), not-a-number where nothing was logged; steps_C (columns,
    2) first and last step of a column; the curves (steps,) over all layers.
    """

    layers: list[str]
    share_LCE: np.ndarray
    steps_C2: np.ndarray
    worst_max_over_mean: np.ndarray
    least_entropy: np.ndarray
    dead: np.ndarray


@dataclass
class RunLog:
    """A run folder in memory."""

    folder: Path
    steps: np.ndarray
    curves: dict[str, np.ndarray]
    load: ExpertLoad | None = None
    num_bad_lines: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""
    plan: str = ""
    schedule: str = ""
    schedule_svg: bytes = b""
    environment: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    """The recipe's keys, as far as it could be read."""

    def last(self, name: str) -> float | None:
        """The newest finite value of a curve."""
        finite = self.curves[name][np.isfinite(self.curves[name])]
        return float(finite[-1]) if finite.size else None

    def key(self, section: str, name: str) -> Any:
        found = self.keys.get(section)
        return found.get(name) if isinstance(found, dict) else None


def read_run(folder: Path) -> RunLog:
    """Everything the report shows of a run folder."""
    log = _read_metrics(folder)
    log.events = [e for e in _json_lines(folder / "events.jsonl") if e is not None]
    log.recipe, log.plan = _text(folder / "recipe.yaml"), _text(folder / "plan.txt")
    log.schedule = _text(folder / "schedule.txt")
    log.schedule_svg = _picture(folder / "schedule.svg")
    log.keys = _mapping(log.recipe)
    log.environment = _mapping(_text(folder / "env.json"))
    return log


def _read_metrics(folder: Path) -> RunLog:
    path = folder / "metrics.jsonl"
    num_lines = _count_lines(path)
    steps: list[int] = []
    curves: dict[str, list[float]] = {name: [] for name in (*CURVES, *_grouped({}))}
    loads = _LoadReader(num_lines)
    num_bad = 0
    for index, record in enumerate(_json_lines(path)):
        step = record.get("step") if record is not None else None
        if record is None or not isinstance(step, int) or not 0 <= step < 2**53:
            num_bad += 1
            continue
        steps.append(step)
        for name in CURVES:
            curves[name].append(number(record.get(name)))
        for name, value in _grouped(record).items():
            curves[name].append(value)
        loads.add(index, step, record.get("expert_load"))
    arrays = {name: np.array(values, dtype=float) for name, values in curves.items()}
    return RunLog(folder, np.array(steps, dtype=float), arrays, loads.result(), num_bad)


def _grouped(record: Mapping[str, Any]) -> dict[str, float]:
    """The curves of a line's objects."""
    found = {}
    for groups, unsaid in ((GROUPS, 0.0), (LEVELS, math.nan)):
        for group, keys in groups.items():
            values = record.get(group)
            values = values if isinstance(values, Mapping) else {}
            found |= {f"{group}.{key}": number(values.get(key, unsaid)) for key in keys}
    sent = record.get("sent_bytes")
    sent = dict(list(sent.items())[:_MOST_COLLECTIVES]) if isinstance(sent, Mapping) else {}
    found |= {f"sent_bytes.{name}": number(sent.pop(name, 0.0)) for name in SENT[:-1]}
    return found | {f"sent_bytes.{SENT[-1]}": float(sum(map(number, sent.values())))}


class _LoadReader:
    def __init__(self, num_lines: int) -> None:
        self._num_lines = max(1, num_lines)
        self._columns = min(MOST_COLUMNS, self._num_lines)
        self._layers: list[str] = []
        self._sums: np.ndarray = np.zeros((0, 0, 0))
        self._counts: np.ndarray = np.zeros((0, 0))
        self._steps = np.full((self._columns, 2), np.nan)
        self._curves: list[tuple[float, float, float]] = []

    def add(self, index: int, step: int, load: Any) -> None:
        column = min(index * self._columns // self._num_lines, self._columns - 1)
        if np.isnan(self._steps[column, 0]):
            self._steps[column, 0] = step
        self._steps[column, 1] = step
        good = _good_load(load)
        if good and not self._layers:
            num_experts = len(next(iter(good.values()))["share"])
            self._layers = list(good)
            self._sums = np.zeros((len(good), self._columns, num_experts))
            self._counts = np.zeros((len(good), self._columns))
        for row, layer in enumerate(self._layers):
            share = good.get(layer, {}).get("share", ())
            if len(share) == self._sums.shape[2]:
                self._sums[row, column] += share
                self._counts[row, column] += 1
        self._curves.append(_worst(list(good.values())))

    def result(self) -> ExpertLoad | None:
        if not self._layers:
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            share = self._sums / self._counts[:, :, None]
        worst, entropy, dead = np.array(self._curves).T
        return ExpertLoad(self._layers, share, self._steps, worst, entropy, dead)


def _good_load(load: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(load, dict):
        return {}
    good = {}
    for layer, values in list(load.items())[:_MOST_LAYERS]:
        share = values.get("share") if isinstance(values, dict) else None
        if isinstance(share, list) and 0 < len(share) <= _MOST_EXPERTS:
            finite = [number(value) for value in share]
            if all(math.isfinite(value) for value in finite):
                good[layer] = {**values, "share": finite}
    return good


def _worst(loads: list[dict[str, Any]]) -> tuple[float, float, float]:
    if not loads:
        return math.nan, math.nan, math.nan
    most = max(number(load.get("max_over_mean")) for load in loads)
    least = min(number(load.get("entropy")) for load in loads)
    return most, least, sum(number(load.get("dead")) for load in loads)


def number(value: Any) -> float:
    """`value` as a float, not-a-number when it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if abs(float(value)) < 1e30 else math.nan
    except OverflowError:
        return math.nan


def _count_lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    except OSError:
        return 0


def _json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line's object; None for a line that is none."""
    try:
        with path.open("rb") as file:
            for text in file:
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError):
                    record = None
                yield record if isinstance(record, dict) else None
    except OSError:
        return


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_MOST_TEXT)
    except OSError:
        return ""


def _picture(path: Path) -> bytes:
    """Empty where it is missing, no picture, or too large to stand in a page."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_PICTURE + 1)
    except OSError:
        return b""
    return data if len(data) <= _MOST_PICTURE and data.lstrip().startswith(b"<svg") else b""


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)  # JSON is YAML
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}
