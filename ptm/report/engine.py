"""What the report shows of the engine: bytes sent beside their bound, pages, waits, the schedule.

Each part is empty where the run has nothing of its kind: one rank sends nothing, and a run whose
states all lie in memory moves no page. The schedule's drawing is shown as a picture, so that
nothing in its file can run.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from ptm.common.units import GIB, MIB, TIB, format_bytes
from ptm.report.chart import Series, line_chart, stack_chart
from ptm.report.read import SENT, RunLog, number

Curve = tuple[str, str]
"""Name in RunLog.curves, and what the chart calls it."""

_WAITS = (
    ("communication_s", "collectives"),
    ("pages.waited_s", "pages"),
    ("updates.waited_s", "updates"),
    ("commits.waited_s", "commits"),
)


def charts(log: RunLog) -> list[str]:
    """Bytes sent, pages moved, waits, lateness; only those that have anything to show."""
    sent = _scaled(log, [(f"sent_bytes.{name}", name) for name in SENT])
    moved = _scaled(log, [("pages.read_bytes", "read"), ("pages.write_bytes", "written")])
    waits = [series(log, *curve) for curve in _WAITS if _is_any(log, curve[0])]
    late = [("updates.late_steps_mean", "mean"), ("updates.late_steps_most", "most")]
    drawn = []
    if sent.curves:
        drawn.append(stack_chart("Bytes sent in a step by rank 0", sent.curves, sent.write))
    if moved.curves:
        drawn.append(
            line_chart("Page traffic of a step, rank 0", moved.curves, moved.write, from_zero=True)
        )
    if moved.curves or len(waits) > 1:
        title = "Waits in a step of rank 0 (s)"
        drawn.append(line_chart(title, waits, "{:.2g}".format, from_zero=True))
    if np.isfinite(log.curves[late[0][0]]).any():
        curves = [series(log, *curve) for curve in late]
        title = "Steps that weights are late, since the start"
        drawn.append(line_chart(title, curves, "{:.3g}".format, from_zero=True))
    return drawn


def memory_chart(log: RunLog) -> str:
    """Memory of rank 0, by tier where pages are on more than one."""
    curves: list[Curve] = [("memory_bytes", "process")]
    if _is_any(log, "tiers.ssd_bytes") or _is_any(log, "tiers.gpu_bytes"):
        curves += [
            ("tiers.gpu_bytes", "pages on the GPU"),
            ("tiers.cpu_bytes", "pages and frames"),
            ("tiers.ssd_bytes", "page file"),
        ]
    found = _scaled(log, curves)
    title = "Memory of rank 0" + (", by tier" if len(found.curves) > 1 else "")
    return line_chart(title, found.curves, found.write, from_zero=True)


def series(log: RunLog, name: str, label: str, *, has_dots: bool = False) -> Series:
    return Series(label, log.steps, log.curves[name], has_dots)


class _Scaled(NamedTuple):
    curves: list[Series]
    write: Callable[[float], str]


def _scaled(log: RunLog, curves: Sequence[Curve]) -> _Scaled:
    """Curves of bytes in one unit, without those that are zero throughout."""
    shown = [(name, label) for name, label in curves if _is_any(log, name)]
    most = max((float(np.nanmax(log.curves[name])) for name, _ in shown), default=0.0)
    unit, letter = next(
        ((size, letter) for letter, size in (("T", TIB), ("G", GIB)) if most >= size), (MIB, "M")
    )
    found = [Series(label, log.steps, log.curves[name] / unit) for name, label in shown]
    return _Scaled(found, f"{{:.3g}}{letter}".format)


def _is_any(log: RunLog, name: str) -> bool:
    values = log.curves[name]
    return bool((values[np.isfinite(values)] > 0).any())


def sections(log: RunLog) -> str:
    """The ledger and the schedule under titles of their own."""
    return _ledger(log.events) + _schedule(log)


def _ledger(events: Sequence[dict[str, Any]]) -> str:
    newest = next((e for e in reversed(events) if e.get("kind") == "ledger"), None)
    costs = newest.get("collectives") if newest else None
    if newest is None or not isinstance(costs, dict) or not costs:
        return ""
    shown = {str(name): _cost(cost) for name, cost in list(costs.items())[:50]}
    if len(shown) > 1:
        shown["all"] = _Cost(*map(sum, zip(*shown.values())))
    rows = "".join(_row(name, cost) for name, cost in shown.items())
    step, steps = number(newest.get("step")), number(newest.get("steps"))
    span = f"in steps {step - steps + 1:,.0f} to {step:,.0f} and their evaluations" * (steps >= 1)
    words = f"what rank 0 sent {span}; the bound is the least that any algorithm sends"
    head = "".join(
        f"<th{kind}>{name}</th>"
        for name, kind in (
            ("collective", ""),
            *((n, ' class="r"') for n in ("calls", "sent", "bound", "sent / bound", "waited")),
        )
    )
    return (
        f"<h2>Collectives <small>{escape(words)}</small></h2>\n"
        f'<div class="card"><table><tr>{head}</tr>{rows}</table></div>\n'
    )


class _Cost(NamedTuple):
    calls: float
    sent_bytes: float
    bound_bytes: float
    waited_s: float


def _cost(found: Any) -> _Cost:
    found = found if isinstance(found, dict) else {}
    return _Cost(*(number(found.get(key)) for key in _Cost._fields))


def _row(name: str, cost: _Cost) -> str:
    sent, bound = cost.sent_bytes, cost.bound_bytes
    cells = (
        f"{cost.calls:,.0f}",
        format_bytes(sent),
        format_bytes(bound),
        f"{sent / bound:.3f}" if bound > 0 else "-",
        f"{cost.waited_s:,.2f} s",
    )
    numbers = "".join(f'<td class="r">{escape(cell)}</td>' for cell in cells)
    return f"<tr><td>{escape(name)}</td>{numbers}</tr>"


def _schedule(log: RunLog) -> str:
    if not log.schedule_svg and not log.schedule.strip():
        return ""
    headline, _, table = log.schedule.strip().partition("\n")
    summary = "the same as a table"
    if log.schedule_svg:
        data = base64.b64encode(log.schedule_svg).decode()
        picture = (
            f'<img src="data:image/svg+xml;base64,{data}" '
            'alt="compute, reads and writes of one step, and what the frames hold">'
        )
    else:
        picture = '<div class="empty">schedule.svg is missing or too large to show.</div>'
        summary = headline
    return (
        "<h2>Page schedule <small>one step of rank 0, as planned from a traced one</small></h2>\n"
        f'<div class="card picture">{picture}</div>\n'
        f"<details><summary>{escape(summary)}</summary>"
        f'<div class="card"><pre>{escape(table.strip() or headline)}</pre></div></details>\n'
    )
