"""Write report.html: one page about one run that needs no network, no server and no other file.

Figures are inline SVG and data: pictures, the style follows light or dark, and the little script
only shows numbers under the pointer. Everything taken from the run folder is escaped, and a content
policy in the page lets nothing run or load but what is written here.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import os
import time
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from ptm.common.errors import RecipeError, StorageError, line
from ptm.common.units import format_bytes, format_count, format_duration
from ptm.report import engine, heat
from ptm.report.chart import Series, line_chart, stack_chart
from ptm.report.read import ExpertLoad, RunLog, number, read_run

_MOST_EVENTS = 300
_WIDE = 1172
_NO_FIELDS = ("time", "kind", "collectives")
"""What an event's row leaves out, because it is shown elsewhere."""


def write_report(run_dir: Path | str, *, out: Path | str | None = None) -> Path:
    """Write the page about a run folder to `out`, or report.html in it, and return its path.

    Raises RecipeError when there is no such folder, StorageError when it cannot be written.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise RecipeError(line("run", run_dir, "must be a run folder", "give the run.dir of a run"))
    text = render(read_run(folder))
    path = folder / "report.html" if out is None else Path(out)
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StorageError(
            line("run", path, f"must be writable ({reason})", "free space or change its owner")
        ) from error
    return path


def render(log: RunLog) -> str:
    """The page as text."""
    package = resources.files("ptm.report")
    script = package.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    name = str(log.key("run", "name") or log.folder.resolve().name)
    status, kind = _status(log)
    load_words, load = _load(log.load)
    shown = log.events[-_MOST_EVENTS:]
    events_words = (
        f"the last {len(shown)} of {len(log.events)}" if len(shown) < len(log.events) else ""
    )
    return Template(package.joinpath("template.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{name} · ptm"),
        script=script,
        script_hash=digest,
        name=escape(name),
        status=escape(status),
        status_kind=kind,
        subtitle=escape(_subtitle(log)),
        notes=_notes(log),
        tiles=_tiles(log),
        charts=_charts(log) or '<div class="card empty">No steps are logged yet.</div>',
        load_words=escape(load_words),
        load=load,
        engine=engine.sections(log),
        events_words=events_words,
        events=_events(shown),
        plan=_pre(log.plan, "plan.txt"),
        recipe=_pre(log.recipe, "recipe.yaml"),
        environment=_pairs(log.environment),
        footer=escape(f"Written {time.strftime('%Y-%m-%d %H:%M')} from {log.folder.resolve()}"),
    )


def _status(log: RunLog) -> tuple[str, str]:
    steps, total = _steps(log)
    if total and steps >= total:
        return "finished", "good"
    if not steps:
        return "no steps yet", "warn"
    kinds = [event.get("kind") for event in reversed(log.events)]
    newest = next((kind for kind in kinds if kind in ("start", "resume", "stop")), None)
    return ("stopped, can go on" if newest == "stop" else "running or cut off"), "warn"


def _steps(log: RunLog) -> tuple[int, int]:
    total = log.key("train", "steps")
    done = int(log.steps.max()) if log.steps.size else 0
    return done, total if isinstance(total, int) else 0


def _subtitle(log: RunLog) -> str:
    words = [f"recipe {log.keys['recipe']}"] if isinstance(log.keys.get("recipe"), str) else []
    scale = log.key("model", "scale")
    words += [f"scale {scale}"] if scale else []
    times = [event["time"] for event in log.events if isinstance(event.get("time"), str)]
    words += [f"{_time(times[0])} to {_time(times[-1])} UTC"] if times else []
    return " · ".join(words)


def _notes(log: RunLog) -> str:
    if not log.num_bad_lines:
        return ""
    words = f"{log.num_bad_lines:,} lines of metrics.jsonl could not be read and are left out."
    return f'<p class="note">{words}</p>'


def _tiles(log: RunLog) -> str:
    steps, total = _steps(log)
    tiles = [("steps", f"{steps:,}", f"of {total:,}" if total else "")]
    bits = log.curves["eval_bits_per_byte"]
    if np.isfinite(bits).any():
        best = int(np.nanargmin(bits))
        tiles.append(
            ("best bits per byte", f"{bits[best]:.3f}", f"held-out, step {int(log.steps[best]):,}")
        )
    for name, label in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        if (value := log.last(name)) is not None:
            tiles.append((label, f"{value:.4f}", "newest"))
    if (tokens := log.last("tokens")) is not None:
        tiles.append(("tokens trained", format_count(tokens), f"{tokens:,.0f}"))
    if (speed := _median(log, "tokens_per_s")) is not None:
        tiles.append(("tokens per second", f"{speed:,.0f}", "median"))
    if (mfu := _median(log, "mfu")) is not None:
        tiles.append(("model FLOP use", f"{mfu:.1%}", "median"))
    memory = log.curves["memory_bytes"]
    if np.isfinite(memory).any():
        tiles.append(("memory of a rank", format_bytes(float(np.nanmax(memory))), "most"))
    step_s = log.curves["step_s"]
    if np.isfinite(step_s).any():
        tiles.append(
            (
                "time in steps",
                format_duration(float(np.nansum(step_s))),
                "without evaluation and saving",
            )
        )
    if skipped := log.last("skipped"):
        tiles.append(("skipped steps", f"{skipped:,.0f}", "gradient not finite"))
    return "".join(
        f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b>'
        f"<i>{escape(more)}</i></div>"
        for label, value, more in tiles
    )


def _median(log: RunLog, name: str) -> float | None:
    finite = log.curves[name][np.isfinite(log.curves[name])]
    return float(np.median(finite)) if finite.size else None


def _charts(log: RunLog) -> str:
    series = functools.partial(engine.series, log)
    loss = [series("loss", "training"), series("eval_loss", "held-out", has_dots=True)]
    spans = [series(f"{k}_s", k) for k in ("compute", "communication", "data")]
    wide = line_chart("Loss (nats a token)", loss, "{:.4g}".format, width=_WIDE, height=300)
    charts = [
        wide.replace('class="chart"', 'class="chart wide"', 1),
        line_chart(
            "Bits per byte, held-out",
            [series("eval_bits_per_byte", "bits per byte", has_dots=True)],
            "{:.3g}".format,
        ),
        line_chart(
            "Gradient norm", [series("grad_norm", "before clipping")], "{:.3g}".format, is_log=True
        ),
        line_chart("Learning rate", [series("lr", "lr")], "{:.3g}".format, from_zero=True),
        line_chart(
            "Tokens per second",
            [series("tokens_per_s", "all ranks")],
            "{:,.0f}".format,
            from_zero=True,
        ),
        line_chart("Model FLOP use", [series("mfu", "MFU")], "{:.1%}".format, from_zero=True),
        engine.memory_chart(log),
        stack_chart("Time of a step (s)", spans, "{:.2g}".format),
    ]
    charts += engine.charts(log)
    if log.load is not None:
        worst = [Series("worst layer", log.steps, log.load.worst_max_over_mean)]
        least = [Series("worst layer", log.steps, log.load.least_entropy)]
        dead = [Series("all layers", log.steps, log.load.dead)]
        charts += [
            line_chart("Busiest expert over the average", worst, "{:.3g}x".format, from_zero=True),
            line_chart("Evenness of the load (entropy, 1 is even)", least, "{:.3g}".format),
            line_chart("Experts without a token", dead, "{:.3g}".format, from_zero=True),
        ]
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _load(load: ExpertLoad | None) -> tuple[str, str]:
    if load is None:
        return "", '<div class="card empty">No expert load is logged.</div>'
    words = f"steps to the right, {load.share_LCE.shape[2]} experts downwards, one picture a layer"
    pictures = "".join(_layer(load, row) for row in range(len(load.layers)))
    ramp = np.arange(heat.FIRST_LEVEL, heat.FIRST_LEVEL + heat.NUM_LEVELS, dtype=np.uint8)[None]
    scale = (
        f'<div class="scale">an eighth of the fair share or less {_picture(ramp, "scale", "")} '
        'eight times or more <span class="dead"></span> nothing at all</div>'
    )
    kind = "layers many" if len(load.layers) > 6 else "layers"
    names = json.dumps(_heat_names()).replace("<", "\\u003c")
    data = f'<script type="application/json" id="heat-names">{names}</script>'
    return words, f'{scale}<div class="{kind}">{pictures}</div>{data}'


def _layer(load: ExpertLoad, row: int) -> str:
    share_CE, name = load.share_LCE[row], load.layers[row]
    seen = share_CE[np.isfinite(share_CE).all(axis=1)]
    newest = seen[-1] if seen.size else np.zeros(1)
    words = f"max {newest.max() * newest.size:.1f}x · dead {int((newest == 0).sum())}"
    steps = json.dumps(
        [[int(number(float(s))) if np.isfinite(s) else 0 for s in pair] for pair in load.steps_C2]
    )
    picture = _picture(
        heat.levels(share_CE), f"expert load of layer {name}", f' data-steps="{steps}"'
    )
    return (
        f'<figure class="layer"><figcaption><b>layer {escape(name)}</b>'
        f'<span class="newest">{words}</span></figcaption>{picture}</figure>'
    )


def _picture(index_EC: np.ndarray, words: str, more: str) -> str:
    light, dark = (heat.data_uri(index_EC, theme) for theme in ("light", "dark"))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(words)}"{more}></picture>'
    )


def _heat_names() -> dict[str, str]:
    """Colour, as `r,g,b`, to what it means, for both palettes."""
    names = {}
    for theme in ("light", "dark"):
        for index, colour in enumerate(heat.palette(theme)):
            names[",".join(map(str, colour))] = heat.meaning(index)
    return names


def _events(events: list[dict[str, Any]]) -> str:
    if not events:
        return '<div class="empty">No events are logged.</div>'
    colours = {"skip": "bad", "stop": "warn", "start": "good", "resume": "good"}
    rows = []
    for event in reversed(events):
        kind = str(event.get("kind", ""))
        fields = " · ".join(_field(k, v) for k, v in event.items() if k not in _NO_FIELDS)
        rows.append(
            f'<tr><td class="time">{escape(_time(str(event.get("time", ""))))}</td>'
            f'<td class="{colours.get(kind, "")}">{escape(kind)}</td><td>{escape(fields)}</td></tr>'
        )
    return (
        f"<table><tr><th>time (UTC)</th><th>event</th><th>details</th></tr>{''.join(rows)}</table>"
    )


def _field(key: str, value: Any) -> str:
    if key.endswith("bytes") and math.isfinite(number(value)):
        return f"{key[:-6]} {format_bytes(number(value))}".strip()
    if key.endswith("_s") and math.isfinite(number(value)):
        return f"{key[:-2]} {number(value):,.4g} s"
    return f"{key} {_short(value)}"


def _short(value: Any) -> str:
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 300 else text[:297] + "..."


def _time(text: str) -> str:
    return text[:19].replace("T", " ")


def _pre(text: str, name: str) -> str:
    return (
        f"<pre>{escape(text)}</pre>"
        if text.strip()
        else f'<div class="empty">No {name} in the folder.</div>'
    )


def _pairs(values: dict[str, Any]) -> str:
    if not values:
        return '<div class="empty">No env.json in the folder.</div>'
    rows = [
        f'<tr><td class="name">{escape(str(key))}</td><td>{escape(_inline(value))}</td></tr>'
        for key, value in values.items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_inline(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_inline, value))
    return _short(value)
