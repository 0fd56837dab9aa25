"""Curves as inline SVG: one function a kind of chart, no library, nothing loaded from anywhere.

A curve with more steps than a point for every two pixels is drawn as the mean of each stretch over
a band from its least to its greatest value, so a spike stays visible at any length. All charts of a
run start at step 0 and end at its last, so that they can be compared by eye. Colours are classes
(s0 to s3) that the page's style sheet sets for light and dark. The points are repeated in
`data-points` for the page's hover line.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 58, 18, 10, 26
Write = Callable[[float], str]


@dataclass
class Series:
    """One curve. Shapes: x (n,) steps, y (n,); values that are not finite are left out."""

    name: str
    x: np.ndarray
    y: np.ndarray
    has_dots: bool = False


@dataclass
class _Drawn:
    name: str
    has_dots: bool
    x: np.ndarray
    mean: np.ndarray
    least: np.ndarray
    most: np.ndarray
    newest: float


def line_chart(
    title: str,
    series: Sequence[Series],
    write: Write,
    *,
    is_log: bool = False,
    from_zero: bool = False,
    width: int = _WIDTH,
    height: int = 210,
) -> str:
    """A figure with one line for each series; empty text when there is nothing to draw."""
    drawn = [d for d in (_thinned(s, width // 2) for s in series) if d.x.size]
    if is_log:
        drawn = [d for d in drawn if (d.least > 0).all()]
    if not drawn:
        return ""
    low = min(float(d.mean.min()) for d in drawn)
    high = max(float(d.mean.max()) for d in drawn)
    low, high = _padded(0.0 if from_zero else low, high, is_log=is_log)
    frame = _Frame(series, low, high, is_log=is_log, width=width, height=height)
    marks = [frame.curve(d, index) for index, d in enumerate(drawn)]
    newest = " · ".join(write(d.newest) for d in drawn)
    return _figure(title, drawn, frame, marks, write, newest)


def stack_chart(
    title: str, series: Sequence[Series], write: Write, *, width: int = _WIDTH, height: int = 210
) -> str:
    """Areas on top of one another; the series share their x."""
    together = np.isfinite(np.array([s.y for s in series])).all(axis=0)
    drawn = [_thinned(Series(s.name, s.x[together], s.y[together]), width // 2) for s in series]
    if not drawn or not drawn[0].x.size:
        return ""
    total = np.sum([d.mean for d in drawn], axis=0)
    # One slow step (the first, an evaluation) must not flatten the rest.
    high = min(float(total.max()), 2.0 * float(np.quantile(total, 0.95)))
    frame = _Frame(series, 0.0, max(high, 1e-9) * 1.05, is_log=False, width=width, height=height)
    base, marks = np.zeros_like(total), []
    for index, d in enumerate(drawn):
        marks.append(frame.area(d.x, base, base + d.mean, f"area s{index}"))
        base = base + d.mean
    newest = write(sum(d.newest for d in drawn))
    return _figure(title, drawn, frame, marks, write, newest)


def _thinned(series: Series, most_points: int) -> _Drawn:
    keep = np.isfinite(series.y) & np.isfinite(series.x)
    x, y = series.x[keep], series.y[keep]
    newest = float(y[-1]) if y.size else math.nan
    if x.size <= most_points:
        return _Drawn(series.name, series.has_dots, x, y, y, y, newest)
    starts = np.arange(most_points) * x.size // most_points
    counts = np.diff(np.append(starts, x.size))
    mean = np.add.reduceat(y, starts) / counts
    least, most = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    return _Drawn(series.name, False, x[starts + counts // 2], mean, least, most, newest)


class _Frame:
    """Axes, and where a value falls on them."""

    def __init__(
        self,
        series: Sequence[Series],
        low: float,
        high: float,
        *,
        is_log: bool,
        width: int,
        height: int,
    ) -> None:
        self.low, self.high, self.is_log = low, high, is_log
        self.width, self.height = width, height
        self.first, self.last = 0.0, max(1.0, *(float(s.x.max()) for s in series))

    def x(self, step: np.ndarray | float) -> np.ndarray:
        inner = self.width - _LEFT - _RIGHT
        return _LEFT + (np.asarray(step) - self.first) / (self.last - self.first) * inner

    def y(self, value: np.ndarray | float) -> np.ndarray:
        value, low, high = np.asarray(value, dtype=float), self.low, self.high
        if self.is_log:
            value, low, high = (
                np.log10(np.maximum(value, 1e-300)),
                math.log10(low),
                math.log10(high),
            )
        share = np.clip((value - low) / (high - low), -0.2, 1.2)
        return self.height - _BOTTOM - share * (self.height - _BOTTOM - _TOP)

    def curve(self, d: _Drawn, index: int) -> str:
        parts = []
        if (d.most > d.least).any():
            parts.append(self.area(d.x, d.least, d.most, f"band s{index}"))
        points = _points(self.x(d.x), self.y(d.mean))
        parts.append(f'<polyline class="line s{index}" points="{points}"/>')
        if d.has_dots or d.x.size == 1:
            parts += [
                f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
                for x, y in zip(self.x(d.x), self.y(d.mean))
            ]
        return "".join(parts)

    def area(self, x: np.ndarray, low: np.ndarray, high: np.ndarray, kind: str) -> str:
        there = _points(self.x(x), self.y(high))
        back = _points(self.x(x[::-1]), self.y(low[::-1]))
        return f'<polygon class="{kind}" points="{there} {back}"/>'

    def axes(self, write: Write) -> str:
        right, bottom = self.width - _RIGHT, self.height - _BOTTOM
        values = _log_ticks(self.low, self.high) if self.is_log else _ticks(self.low, self.high, 4)
        parts = []
        for value in values:
            y, label = float(self.y(value)), escape(write(value))
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{label}'
                "</text>"
            )
        for step in _ticks(self.first, self.last, 6):
            if step == int(step):
                x, label = float(self.x(step)), _short_step(int(step))
                parts.append(
                    f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}'
                    "</text>"
                )
        return "".join(parts)


def _figure(
    title: str,
    drawn: Sequence[_Drawn],
    frame: _Frame,
    marks: Sequence[str],
    write: Write,
    newest: str,
) -> str:
    names = [d.name for d in drawn]
    keys = [f'<span class="key s{i}">{escape(name)}</span>' for i, name in enumerate(names)]
    legend = "".join(keys) if len(keys) > 1 else ""
    data = [
        {
            "name": d.name,
            "x": [round(float(x), 1) for x in frame.x(d.x)],
            "step": [int(x) for x in d.x],
            "text": [write(float(y)) for y in d.mean],
        }
        for d in drawn
    ]
    clip = f"clip{zlib.crc32(title.encode())}"
    width, height = frame.width, frame.height
    points = escape(json.dumps(data, separators=(",", ":")))
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{legend}'
        f'<span class="newest">{escape(newest)}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'data-points="{points}"><clipPath id="{clip}"><rect x="{_LEFT - 5}" y="{_TOP}" '
        f'width="{width - _LEFT - _RIGHT + 10}" height="{height - _TOP - _BOTTOM}"/></clipPath>'
        f'{frame.axes(write)}<g clip-path="url(#{clip})">{"".join(marks)}</g>'
        f'<line class="cursor" y1="{_TOP}" y2="{height - _BOTTOM}" x1="-9" x2="-9"/></svg></figure>'
    )


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))


def _padded(low: float, high: float, *, is_log: bool) -> tuple[float, float]:
    if is_log:
        return low / 1.15, high * 1.15
    gap = (high - low) or abs(high) or 1.0
    return (low - 0.05 * gap if low else 0.0), high + 0.07 * gap


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from low to high."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / size - 1e-9)
    return [n * size for n in range(first, math.floor(high / size + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    dense = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    sparse = [10.0**p for p in powers]
    within = [value for value in dense if low <= value <= high]
    return within if len(within) <= 6 else [value for value in sparse if low <= value <= high]


def _short_step(step: int) -> str:
    if step >= 1_000_000:
        return f"{step / 1e6:g}M"
    return f"{step / 1e3:g}k" if step >= 10_000 else f"{step}"
