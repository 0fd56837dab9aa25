"""The model card of an export, and the table that the verb prints: what it is, and how good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from ptm.common.units import format_bytes
from ptm.export.config import ExportConfig, Method


class Found(Protocol):
    """What is read of a record of ptm/export/quantize.py."""

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def error(self) -> float | None: ...
    @property
    def nearest(self) -> float | None: ...
    @property
    def rows(self) -> int: ...
    @property
    def own(self) -> int | None: ...
    @property
    def damping(self) -> float | None: ...


def kind_of(name: str) -> str:
    """What a linear is in its layer: q_proj, experts.w1, gate.query."""
    inner = name.partition("model.layers.")[2].partition(".")[2]
    parts = [p for p in inner.split(".") if not p.isdigit()]
    return ".".join(parts[1:])


def table(records: Sequence[Found]) -> list[tuple[str, int, str, str]]:
    """Rows of (kind, linears, error, nearest) in the order of a layer."""
    kinds: dict[str, list[Found]] = {}
    for record in records:
        kinds.setdefault(kind_of(record.name), []).append(record)
    shown = []
    for kind, found in kinds.items():
        errors = [
            f"{sum(values) / len(values):.2e}"
            if (values := [v for r in found if (v := getattr(r, key)) is not None])
            else "-"
            for key in ("error", "nearest")
        ]
        shown.append((kind, len(found), *errors))
    return shown


def starved(records: Sequence[Found]) -> list[Found]:
    """Experts that were fitted with tokens of others, once each."""
    few = [r for r in records if r.own is not None and r.own < r.rows]
    return list({expert_of(r.name): r for r in reversed(few)}.values())[::-1]


def expert_of(name: str) -> str:
    """The expert that a linear belongs to."""
    return name.rpartition(".")[0]


def model_card(
    config: ExportConfig, num_parameters: int, records: Sequence[Found], size_bytes: int
) -> str:
    how = "GPTQ" if config.method is Method.gptq else "rounding to nearest"
    if config.method is Method.trained:
        how = "training on that grid"
    bits = " or ".join(map(str, sorted({r.bits for r in records})))
    sizes = sorted({r.group for r in records}, key=lambda group: group or math.inf)
    groups = " or ".join(str(group) if group else "a row" for group in sizes)
    lines = [
        "---",
        "library_name: ptm",
        f"tags: [{config.format}, {'mixed' if config.size else f'{config.width}-bit'}, moe]",
        "---",
        "",
        f"{num_parameters:,} parameters in {format_bytes(size_bytes)}: {bits} bits, "
        f"groups of {groups}, by {how}; "
        "everything else in 16 bits.",
        "",
        "Relative error of outputs on calibration text, mean over linears of a kind, beside that "
        "of rounding to nearest:",
        "",
        "| kind | linears | error | nearest |",
        "|---|---|---|---|",
        *(
            f"| {kind} | {count} | {error} | {near} |"
            for kind, count, error, near in table(records)
        ),
    ]
    few = starved(records)
    if few:
        lines += [
            "",
            f"Experts with few tokens of their own, fitted with others' ({len(few)}):",
            "",
        ]
        lines += [f"- {expert_of(r.name)}: {r.own} of {r.rows}" for r in few]
    raised = [r for r in records if r.damping is not None]
    if raised:
        lines += ["", f"Damping was raised for {len(raised)}:", ""]
        lines += [f"- {r.name}: {r.damping:g}" for r in raised]
    return "\n".join(lines) + "\n"
