"""Drawings: errors by layer, a panel a kind of linear, a line an export, log scale; and bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from ptm.export.config import Width

WIDTH, HEIGHT, PAD = 260, 150, 34
SHADES = {4: "#c6dbef", 8: "#4292c6", 16: "#08306b"}
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def errors_svg(rows: Sequence[Mapping[str, Any]], exports: Sequence[str], kind_of: Any) -> str:
    """rows: `name` (model.layers.N. ...) and an error per export; kind_of: name -> kind."""
    kinds: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        layer = int(row["name"].split(".")[2])
        for export in exports:
            if row.get(export):
                of = kinds.setdefault(kind_of(row["name"]), {}).setdefault(export, {})
                of.setdefault(layer, []).append(row[export])
    columns = min(3, max(1, len(kinds)))
    height = HEIGHT * -(-len(kinds) // columns) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * columns}" height="{height}" '
        'font-family="sans-serif" font-size="10">'
        f'<rect width="{WIDTH * columns}" height="{height}" fill="white"/>'
    ]
    for i, (kind, series) in enumerate(kinds.items()):
        x, y = WIDTH * (i % columns), HEIGHT * (i // columns)
        parts.append(_panel(kind, series, exports, x, y))
    for i, export in enumerate(exports):
        at = f'x="{PAD + 140 * i}" y="{height - 10}"'
        parts.append(f'<text {at} fill="{COLOURS[i % 4]}">{escape(export)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def bits_svg(widths: Mapping[str, Width]) -> str:
    """One row of cells a layer, one cell a linear (model.layers.N. ...), darker with more bits."""
    layers: dict[int, list[tuple[str, Width]]] = {}
    for name, width in widths.items():
        layers.setdefault(int(name.split(".")[2]), []).append((name, width))
    cell, left, top = 9, 60, 28
    wide = left + cell * max(map(len, layers.values())) + 10
    tall = top + 14 * len(layers) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{tall}" '
        f'font-family="sans-serif" font-size="10"><rect width="{wide}" height="{tall}" '
        'fill="white"/><text x="4" y="16" font-weight="bold">bits of each linear</text>'
    ]
    for i, (layer, row) in enumerate(sorted(layers.items())):
        y = top + 14 * i
        parts.append(f'<text x="4" y="{y + 10}">layer {layer}</text>')
        for j, (name, width) in enumerate(row):
            parts.append(
                f'<rect x="{left + cell * j}" y="{y}" width="{cell - 1}" height="12" '
                f'fill="{SHADES[width.bits]}"><title>{escape(name)}: {width}</title></rect>'
            )
    for i, (count, shade) in enumerate(SHADES.items()):
        x = left + 40 * i
        parts.append(
            f'<rect x="{x}" y="{tall - 18}" width="10" height="10" fill="{shade}"/>'
            f'<text x="{x + 14}" y="{tall - 9}">{count}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _panel(
    kind: str,
    series: Mapping[str, Mapping[int, Sequence[float]]],
    exports: Sequence[str],
    x: int,
    y: int,
) -> str:
    means = {
        name: {layer: sum(v) / len(v) for layer, v in sorted(of.items())}
        for name, of in series.items()
    }
    logs = [math.log10(v) for of in means.values() for v in of.values()]
    layers = [layer for of in means.values() for layer in of]
    low, high = math.floor(min(logs)), math.ceil(max(logs) + 1e-9)
    first, last = min(layers), max(layers)
    wide, tall = WIDTH - 2 * PAD, HEIGHT - 2 * PAD

    def place(layer: int, value: float) -> tuple[float, float]:
        across = (layer - first) / max(last - first, 1)
        up = (math.log10(value) - low) / max(high - low, 1)
        return x + PAD + wide * across, y + HEIGHT - PAD - tall * up

    parts = [f'<text x="{x + PAD}" y="{y + PAD - 8}" font-weight="bold">{escape(kind)}</text>']
    for power in range(low, high + 1):
        _, at = place(first, 10.0**power)
        parts.append(
            f'<line x1="{x + PAD}" x2="{x + PAD + wide}" y1="{at:.1f}" y2="{at:.1f}" '
            f'stroke="#ddd"/><text x="{x + 2}" y="{at + 3:.1f}">1e{power}</text>'
        )
    foot = y + HEIGHT - PAD + 12
    parts.append(f'<text x="{x + PAD}" y="{foot}">layer {first} to {last}</text>')
    for i, name in enumerate(exports):
        points = [place(layer, value) for layer, value in means.get(name, {}).items()]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        colour = COLOURS[i % 4]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2" fill="{colour}"/>' for a, b in points]
    return "\n".join(parts)
