"""The bars of `ptm bench kernels` as one SVG: how long each contestant takes over ours."""

from __future__ import annotations

from html import escape
from typing import Any

LABELS, BARS, ROW, HEAD = 190, 420, 16, 26
COLOURS = ("#1b6ca8", "#7fb0d3", "#b8b8b8", "#d08c4a", "#a8583c", "#6d6d6d")


def draw(found: dict[str, Any]) -> str:
    """An SVG of the numbers that the bench writes as JSON; bars share one scale, in ratios."""
    cases = found["cases"]
    longest = max(row["ratio_least"] for case in cases for row in case["rows"])
    marks, y = [], 34
    for case in cases:
        marks.append(_text(4, y + 12, f"{case['op']}: {case['case']}", "head"))
        y += HEAD - 6
        for i, row in enumerate(case["rows"]):
            width = max(1.0, BARS * row["ratio_least"] / longest)
            told = f"{row['ratio_least']:.2f}x, {row['least_s'] * 1e3:.2f} ms"
            marks.append(_text(LABELS - 6, y + 11, row["name"], "name"))
            colour = COLOURS[i % len(COLOURS)]
            marks.append(f'<rect x="{LABELS}" y="{y}" width="{width:.1f}" height="{ROW - 3}" '
                         f'fill="{colour}"/>')  # fmt: skip
            marks.append(_text(LABELS + width + 4, y + 11, told, "told"))
            y += ROW
        y += HEAD - ROW
    title = f"time over ours, least of {found['rounds']} rounds, {found['threads']} thread(s)"
    style = ("text{font:11px sans-serif;fill:#222}.head{font-weight:bold}"
             ".name{text-anchor:end}.title{font-size:13px}")  # fmt: skip
    size = f'width="{LABELS + BARS + 110}" height="{y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{_text(4, 18, title, "title")}'
        f"{''.join(marks)}</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.0f}" y="{y}" class="{kind}">{escape(text)}</text>'
