"""One step of a schedule, drawn as SVG by hand: time to the right, a row each for compute, the read
link and the write link, and below them what the frames hold.

The first unit's forward is at the left. What a link carries across the end of the step is drawn at
both ends, because every step is alike. Neighbours of one colour are drawn as one bar, so a step of
many thousand pages stays a small file; a tip over a bar says what it is.

In the strip of frames a page counts from the start of its fetch to its last use before it leaves;
between that and the next fetch its frame is *waiting*: still written from, or free to read ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from ptm.common.units import format_bytes

if TYPE_CHECKING:
    from ptm.engine.schedule import Schedule

_WIDTH, _LEFT, _RIGHT = 1200, 96, 24
_COMPUTE, _READ, _WRITE, _FRAMES, _ROW, _STRIP = 72, 122, 172, 228, 36, 150
_HEIGHT = _FRAMES + _STRIP + 32
_PHASES = {"forward": "#c9d3dd", "backward": "#9fb0c0", "update": "#c3b7d9"}
_KINDS = {"weights": "#2f6db5", "states": "#e08a1e", "grads": "#3a9a5b", "pages": "#6b7680"}
_STALL, _WAITING, _INK = "#d23b3b", "#ececec", "#222"


class _Bar(NamedTuple):
    start_s: float
    end_s: float
    name: str
    label: str


def draw(schedule: Schedule) -> str:
    """The whole drawing, as the text of an SVG file."""
    step_s = schedule.step_s
    if not step_s > 0:
        step_s = 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / step_s
    marks = [
        *_row("compute", _COMPUTE, _compute(schedule), scale, _PHASES | {"wait": _STALL}),
        *_row("read link", _READ, _link(schedule, False), scale, _KINDS),
        *_row("write link", _WRITE, _link(schedule, True), scale, _KINDS),
        *_strip(schedule, scale),
        *_axis(step_s, scale),
        *_legend(schedule),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12" '
        f'fill="{_INK}"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n'
        f"{_text(_LEFT, 22, schedule.headline(), size=13)}\n" + "\n".join(marks) + "\n</svg>\n"
    )


def _compute(schedule: Schedule) -> Iterator[_Bar]:
    accesses, line = schedule.trace.accesses, schedule.timeline
    for access, work, got, waited in zip(
        accesses, schedule.trace.work_s(), line.at_s, line.waited_s
    ):
        phase = access.what.partition(" ")[0]
        yield _Bar(got - waited, got, "wait", f"wait in {access.what}")
        yield _Bar(got, got + work, phase, access.what)


def _link(schedule: Schedule, is_write: bool) -> list[_Bar]:
    line = schedule.timeline
    moved = [*line.writes, *line.commits] if is_write else line.reads
    step_s, bars = schedule.step_s, []
    for transfer in moved:
        if transfer is None:
            continue
        turns = math.floor(transfer.start_s / step_s) if step_s > 0 else 0
        start, end = transfer.start_s - turns * step_s, transfer.end_s - turns * step_s
        kind = schedule.trace.kind_of(transfer.page)
        bars.append(_Bar(start, min(end, step_s), kind, kind))
        if end > step_s:
            bars.append(_Bar(0.0, end - step_s, kind, kind))
    return sorted(bars)


def _row(
    title: str, y: int, bars: Iterable[_Bar], scale: float, colours: dict[str, str]
) -> Iterator[str]:
    yield _text(_LEFT - 10, y + _ROW / 2 + 4, title, anchor="end")
    yield _rect(_LEFT, y, _WIDTH - _LEFT - _RIGHT, _ROW, "#f7f7f7", "")
    for bar in _joined(bars, 0.3 / scale):
        x, width = _LEFT + bar.start_s * scale, (bar.end_s - bar.start_s) * scale
        seconds = f"{bar.label}: {bar.end_s - bar.start_s:.4f} s from {bar.start_s:.4f} s"
        yield _rect(x, y, width, _ROW, colours.get(bar.name, _KINDS["pages"]), seconds)
        unit = bar.label.partition(" ")[2]
        if bar.name in _PHASES and width > 6.5 * len(unit) + 4:
            yield _text(x + width / 2, y + _ROW / 2 + 4, unit, anchor="middle", size=11)


def _joined(bars: Iterable[_Bar], gap_s: float) -> Iterator[_Bar]:
    """Touching bars of one label as one; bars too thin to see joined to the one before."""
    current: _Bar | None = None
    for bar in bars:
        if bar.end_s <= bar.start_s:
            continue
        if current and bar.label == current.label and bar.start_s - current.end_s <= gap_s:
            current = current._replace(end_s=bar.end_s)
        else:
            if current:
                yield current
            current = bar
    if current:
        yield current


def _strip(schedule: Schedule, scale: float) -> Iterator[str]:
    """Frames over time as areas on top of one another, one a kind."""
    frames, bottom = schedule.num_frames, _FRAMES + _STRIP
    kinds = sorted({schedule.trace.kind_of(p) for p in schedule.trace.positions}, key=_kind_order)
    edges, counts = _occupancy(schedule, kinds)
    yield _text(_LEFT - 10, _FRAMES + _STRIP / 2, "frames", anchor="end")
    yield _rect(_LEFT, _FRAMES, _WIDTH - _LEFT - _RIGHT, _STRIP, _WAITING, "waiting")
    base = [0.0] * len(edges)
    for kind in kinds:
        top = [low + count for low, count in zip(base, counts[kind])]
        there = _stairs(edges, top, schedule.step_s, scale, bottom, _STRIP / frames)
        back = _stairs(edges, base, schedule.step_s, scale, bottom, _STRIP / frames)
        points = " ".join([*there, *reversed(back)])
        yield f'<polygon points="{points}" fill="{_KINDS.get(kind, _KINDS["pages"])}">'
        yield f"<title>{escape(kind)}</title></polygon>"
        base = top
    for share in (0, 0.5, 1):
        count, y = round(frames * share), bottom - _STRIP * share
        yield _text(_WIDTH - _RIGHT + 4, y + 4, str(count), size=10)


def _occupancy(schedule: Schedule, kinds: list[str]) -> tuple[list[float], dict[str, list[float]]]:
    """For up to 1000 moments of the step, how many frames hold a page of each kind for a use."""
    step_s, moments = schedule.step_s, min(1000, 4 * max(1, schedule.num_positions))
    edges = [step_s * k / moments for k in range(moments)]
    change = {kind: [0.0] * (moments + 1) for kind in kinds}
    moved = {move.page for move in schedule.moves}
    for page in schedule.trace.positions:
        if page not in moved:
            change[schedule.trace.kind_of(page)][0] += 1
    for page, start, end in _lives(schedule):
        counts = change[schedule.trace.kind_of(page)]
        first = math.floor(start / step_s * moments)
        last = max(first + 1, math.ceil(end / step_s * moments))
        counts[0] += (last // moments) - (first // moments)
        counts[first % moments] += 1
        counts[last % moments] -= 1
    for counts in change.values():
        for k in range(moments):
            counts[k + 1] += counts[k] if k + 1 < moments else 0
    return edges, {kind: counts[:moments] for kind, counts in change.items()}


def _lives(schedule: Schedule) -> Iterator[tuple[int, float, float]]:
    """(page, start of its fetch, its last use before it leaves) in seconds, for every fetch."""
    count, step_s, at_s = schedule.num_positions, schedule.step_s, schedule.timeline.at_s
    leaves: dict[int, list[int]] = {}
    for move in schedule.moves:
        leaves.setdefault(move.evicts, []).append(move.last_use)
    for move, read in zip(schedule.moves, schedule.timeline.reads):
        need = move.needed_at % count
        ends = [last + (count if last < need else 0) for last in leaves[move.page]]
        last = min(ends)
        start = read.start_s if read else at_s[need]
        yield move.page, start, at_s[last % count] + last // count * step_s


def _stairs(
    edges: list[float], level: list[float], step_s: float, scale: float, bottom: float, unit: float
) -> list[str]:
    points = []
    for start, end, value in zip(edges, [*edges[1:], step_s], level):
        y = bottom - value * unit
        points += [f"{_LEFT + x * scale:.1f},{y:.1f}" for x in (start, end)]
    return points


def _axis(step_s: float, scale: float) -> Iterator[str]:
    y = _FRAMES + _STRIP
    power = 10.0 ** math.floor(math.log10(step_s / 8))
    size = next(power * m for m in (1, 2, 5, 10) if power * m >= step_s / 8)
    for k in range(int(step_s / size + 1e-9) + 1):
        x = _LEFT + k * size * scale
        yield (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_COMPUTE}" y2="{y + 5}" stroke="black" '
            'stroke-opacity="0.15"/>'
        )
        yield _text(x, y + 18, f"{k * size:g} s", anchor="middle", size=11)


def _legend(schedule: Schedule) -> Iterator[str]:
    kinds = sorted({schedule.trace.kind_of(p) for p in schedule.trace.positions}, key=_kind_order)
    keys = [*_PHASES.items(), ("wait", _STALL)]
    keys += [(kind, _KINDS.get(kind, _KINDS["pages"])) for kind in kinds]
    keys.append(("frame waiting", _WAITING))
    x = float(_LEFT)
    for name, colour in keys:
        yield _rect(x, 38, 14, 14, colour, name)
        yield _text(x + 19, 50, name)
        x += 19 + 7.2 * len(name) + 22
    page = f"one page is {format_bytes(schedule.page_bytes)}"
    yield _text(_WIDTH - _RIGHT, 50, page, anchor="end")


def _kind_order(kind: str) -> int:
    return list(_KINDS).index(kind) if kind in _KINDS else len(_KINDS)


def _rect(x: float, y: float, width: float, height: float, fill: str, tip: str) -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.3):.1f}" height="{height}" '
        f'fill="{fill}">{title}</rect>'
    )


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(words)}</text>"
    )
