"""The report: complete for a good run, and calm about a bad folder."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ptm.common.errors import RecipeError, StorageError
from ptm.report import heat
from ptm.report.chart import Series, line_chart, stack_chart
from ptm.report.html import write_report
from ptm.report.read import CURVES, MOST_COLUMNS, read_run


def make_run(folder: Path, *, steps: int, layers: int = 2, experts: int = 8) -> None:
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {"step": step, **{name: 1.0 / step + 0.1 for name in CURVES[:-1]}}
            share = [0.0] + [1 / (experts - 1)] * (experts - 1)
            load = {"share": share, "entropy": 0.9, "max_over_mean": 1.2, "dead": 1}
            record["expert_load"] = {str(layer): load for layer in range(layers)}
            file.write(json.dumps(record) + "\n")
    events = [
        {"time": "2026-01-02T03:04:05.678+00:00", "kind": k, "step": 3} for k in ("start", "stop")
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "recipe.yaml").write_text(
        f"recipe: m32\nrun: {{name: my run}}\ntrain: {{steps: {steps}}}\n"
    )
    (folder / "plan.txt").write_text("memory per rank\n")
    (folder / "env.json").write_text('{"torch": "2.13.0", "threads": 2}')


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str, kind: str | None = None) -> int:
        return sum(
            t == tag and (kind is None or kind in (a.get("class") or "")) for t, a in self.tags
        )


COST = {"calls": 9, "sent_bytes": 3 * 2**20, "bound_bytes": 2 * 2**20, "waited_s": 1.5}
PICTURE = re.compile(r"data:image/(png|svg\+xml);base64,[A-Za-z0-9+/]+=*$")


def add_pages(folder: Path) -> None:
    """What a run leaves whose ranks send and whose pages move."""
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        step = record["step"]
        record["sent_bytes"] = {"gather": 5e6, "state": 20, "counts": 30}
        record["tiers"] = {"cpu_bytes": 10**8, "ssd_bytes": 10**9}
        record["updates"] = {"late_steps_mean": 0.5, "late_steps_most": 1}
        if step % 2:
            record["pages"] = {"read_bytes": step * 10**6, "write_bytes": 10**6, "waited_s": 0.1}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    ledger = {"kind": "ledger", "step": 30, "steps": 20, "collectives": {"gather": COST, "b": COST}}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(ledger) + "\n")
    (folder / "schedule.txt").write_text("27 pages in 12 frames\n\nphase  unit\n")
    (folder / "schedule.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><g/></svg>")


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_report_of_a_run(tmp_path: Path) -> None:
    make_run(tmp_path, steps=30)
    page = page_of(tmp_path)
    words = " ".join(page.words)
    for wanted in (
        "my run",
        "finished",
        "best bits per byte",
        "2026-01-02 03:04:05",
        "memory per rank",
        "2.13.0",
    ):
        assert wanted in words
    assert page.count("figure", "chart") == 11 and page.count("figure", "layer") == 2
    assert list(tmp_path.glob("report.html.*")) == []


def test_report_of_a_run_with_pages(tmp_path: Path) -> None:
    make_run(tmp_path, steps=30)
    add_pages(tmp_path)
    page = page_of(tmp_path)
    assert page.count("figure", "chart") == 15
    text = " ".join(page.words)
    for wanted in (
        "Memory of rank 0, by tier",
        "Bytes sent in a step by rank 0",
        "Page traffic of a step",
        "Waits in a step",
        "Steps that weights are late",
        "in steps 11 to 30",
        "gather 9 3.00 MiB 2.00 MiB 1.500 1.50 s",
        "all 18 6.00 MiB 4.00 MiB 1.500 3.00 s",
        "the same as a table",
        "phase  unit",
    ):
        assert wanted in text
    pictures = [a["src"] or "" for tag, a in page.tags if tag == "img" and "src" in a]
    assert sum(address.startswith("data:image/svg+xml") for address in pictures) == 1
    log = read_run(tmp_path)
    assert log.curves["sent_bytes.others"].tolist() == [50.0] * 30
    assert log.curves["pages.read_bytes"][:3].tolist() == [1e6, 0.0, 3e6]  # unsaid is none


def test_a_run_without_pages_shows_none(tmp_path: Path) -> None:
    make_run(tmp_path, steps=30)
    words = page_of(tmp_path).words
    assert not {"Collectives ", "Page schedule "} & set(words) and "Memory of rank 0" in words


@pytest.mark.parametrize(
    "ledger",
    [{}, {"collectives": 3}, {"collectives": {"<form>": 1, "x": {"calls": "a", "sent_bytes": []}}}],
    ids=["none", "number", "odd"],
)
def test_an_odd_ledger_is_survived(tmp_path: Path, ledger: dict[str, object]) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps({"kind": "ledger", **ledger}) + "\n")
    page = page_of(tmp_path)
    assert "Events " in page.words and page.count("form") == 0


@pytest.mark.parametrize(
    "svg",
    [
        b"<svg onload=alert(1)><script>alert(2)</script></svg>",
        b"<html>",
        b"<svg>" + b" " * 5_000_000,
    ],
    ids=["script", "no_svg", "large"],
)
def test_a_schedule_cannot_run_or_fill_the_page(tmp_path: Path, svg: bytes) -> None:
    (tmp_path / "schedule.svg").write_bytes(svg)
    (tmp_path / "schedule.txt").write_text("<script>alert(3)</script>\n\nphase\n")
    page = page_of(tmp_path)
    assert page.count("script") == 1 and not any("onload" in attrs for _, attrs in page.tags)
    assert (tmp_path / "report.html").stat().st_size < 100_000
    assert ("missing or too large" in "".join(page.words)) == (b"script" not in svg)


def test_report_elsewhere(tmp_path: Path) -> None:
    assert write_report(tmp_path, out=tmp_path / "a.html") == tmp_path / "a.html"
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(StorageError, match="must be writable"):
        write_report(tmp_path, out=tmp_path / "absent" / "a.html")


def test_report_needs_nothing_from_outside(tmp_path: Path) -> None:
    make_run(tmp_path, steps=30)
    add_pages(tmp_path)
    page = page_of(tmp_path)
    addresses = [
        a[k] or "" for _, a in page.tags for k in ("src", "href", "srcset", "data") if k in a
    ]
    assert addresses and all(PICTURE.match(address) for address in addresses)
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"link", "iframe", "object", "embed", "base", "form"}
    )
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r"url\((?!#)|@import|https?://|fetch\(|XMLHttpRequest", text) == []


def test_everything_is_escaped(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    clean = page_of(tmp_path)
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>$name</pre>'
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    load = record["expert_load"]["0"]
    records = [
        record | {"step": step, "expert_load": {evil: load, "1": load}} for step in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "events.jsonl").write_text(
        "".join(json.dumps({"time": evil, "kind": evil, evil: evil}) + "\n" for _ in range(2))
    )
    keys = {"recipe": evil, "run": {"name": evil}, "train": {"steps": 3}, "model": {"scale": evil}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(keys))
    (tmp_path / "plan.txt").write_text(evil)
    (tmp_path / "env.json").write_text(json.dumps({evil: evil, "b": [evil]}))
    page = page_of(tmp_path)
    assert page.count("script") == clean.count("script") == 2
    assert page.count("img") == clean.count("img") and page.count("pre") == clean.count("pre")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "".join(page.words).count(evil) >= 8


GOOD = '{"step": 1, "loss": 2.0}\n'
BAD_LINES = [
    '{"step": 2, "los',
    "null\n",
    "[1]\n",
    '{"loss": 1}\n',
    '{"step": "3"}\n',
    "\0\0\0\n",
    "[" * 9999 + "\n",
]


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines_are_counted_and_left_out(tmp_path: Path, bad: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(GOOD + bad)
    log = read_run(tmp_path)
    assert (log.steps.tolist(), log.num_bad_lines) == ([1], 1)
    assert "could not be read" in "".join(page_of(tmp_path).words)


ODD = [
    '{"step": 1, "loss": null, "lr": "x", "mfu": true, "memory_bytes": 1e999, "tokens": NaN}',
    '{"step": 1, "expert_load": {"0": {"share": []}, "1": 3, "2": {"share": ["x"]}}}',
    '{"step": 1, "expert_load": {"0": {"share": [0.5, 0.5]}}}',
    '{"step": 1, "loss": 1%s}' % ("0" * 400),
    '{"step": 1, "grad_norm": -1, "loss": 0}',
    '{"step": 1, "sent_bytes": {"gather": "x", "a": null}, "pages": [1], "tiers": {"a": {}}}',
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_values_are_survived(tmp_path: Path, odd: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(odd + "\n" + odd + "\n")
    assert "steps" in "".join(page_of(tmp_path).words)


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "events.jsonl", "recipe.yaml", "plan.txt", "env.json", "schedule.svg"],
)
@pytest.mark.parametrize(
    "body",
    [None, b"", b"\xff\xfe{", b"{" * 500, b"- 1\n"],
    ids=["missing", "empty", "not_text", "open", "list"],
)
def test_any_file_may_be_bad(tmp_path: Path, name: str, body: bytes | None) -> None:
    make_run(tmp_path, steps=3)
    add_pages(tmp_path)
    (tmp_path / name).unlink()
    if body is not None:
        (tmp_path / name).write_bytes(body)
    assert "Curves" in "".join(page_of(tmp_path).words)


def test_empty_folder_and_no_folder(tmp_path: Path) -> None:
    words = "".join(page_of(tmp_path).words)
    assert "no steps yet" in words and "No events are logged." in words
    with pytest.raises(RecipeError, match="run=.*must be a run folder"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize(
    "kinds, status",
    [
        (["start"], "running or cut off"),
        (["start", "stop"], "stopped, can go on"),
        (["stop", "resume", "eval"], "running or cut off"),
    ],
)
def test_status_of_an_unfinished_run(tmp_path: Path, kinds: list[str], status: str) -> None:
    make_run(tmp_path, steps=3)
    (tmp_path / "recipe.yaml").write_text("train: {steps: 9}")
    (tmp_path / "events.jsonl").write_text("".join(json.dumps({"kind": k}) + "\n" for k in kinds))
    assert status in page_of(tmp_path).words


@pytest.mark.slow
def test_long_run_stays_small(tmp_path: Path) -> None:
    make_run(tmp_path, steps=100_000, layers=1, experts=4)
    log = read_run(tmp_path)
    assert log.steps.size == 100_000 and log.load is not None
    assert log.load.share_LCE.shape == (1, MOST_COLUMNS, 4)
    assert log.load.steps_C2[[0, -1]].tolist() == [[1, 500], [99501, 100000]]
    assert write_report(tmp_path).stat().st_size < 3_000_000


def test_many_layers_and_experts_stay_small(tmp_path: Path) -> None:
    make_run(tmp_path, steps=MOST_COLUMNS, layers=24, experts=32)
    rng = np.random.default_rng(0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for text in lines:
            record = json.loads(text)
            for load in record["expert_load"].values():
                load["share"] = rng.dirichlet(np.ones(32)).tolist()  # noise packs worst
            file.write(json.dumps(record) + "\n")
    assert write_report(tmp_path).stat().st_size < 3_000_000


def pixels_of(address: str) -> list[tuple[int, ...]]:
    """Decode the palette PNGs that heat.py writes: an independent reading of the format."""
    data = base64.b64decode(address.split(",")[1])
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + body
        )
        chunks[kind], at = body, at + 12 + size
    columns, rows = struct.unpack(">II", chunks[b"IHDR"][:8])
    raw = zlib.decompress(chunks[b"IDAT"])
    return [tuple(raw[r * (columns + 1) + 1 :][:columns]) for r in range(rows)]


def test_heat_map_levels() -> None:
    middle = heat.FIRST_LEVEL + heat.NUM_LEVELS // 2
    share_CE = np.array([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.125, 0.375, 1e-9], [np.nan] * 4])
    index_EC = heat.levels(share_CE)
    assert index_EC[:, 0].tolist() == [middle] * 4
    assert index_EC[1:, 1].tolist() == [heat.DEAD] * 3
    assert index_EC[0, 2] - middle == middle - index_EC[1, 2] == 10  # twice and half: an octave
    assert index_EC[3, 2] == heat.FIRST_LEVEL and (index_EC[:, 3] == heat.MISSING).all()
    assert pixels_of(heat.data_uri(index_EC, "light")) == [tuple(row) for row in index_EC.tolist()]
    assert heat.meaning(middle) == "1.00 x its fair share"
    for theme in ("light", "dark"):
        assert (
            len(set(heat.palette(theme))) == heat.NUM_LEVELS + 2
        )  # the hover finds levels by colour


def test_chart_keeps_spikes_and_drops_what_is_not_finite() -> None:
    x = np.arange(10_000.0)
    y = np.ones(10_000)
    y[5000], y[77] = 50.0, np.nan
    text = line_chart("t", [Series("a", x, y)], "{:.3g}".format)
    assert text.count("<polyline") == 1 and 'class="band s0"' in text and "nan" not in text
    assert line_chart("t", [Series("a", x, y * np.nan)], str) == ""
    assert line_chart("t", [Series("a", x, -y)], str, is_log=True) == ""
    one = line_chart("t", [Series("a", np.array([5.0]), np.array([0.0]))], str)
    assert "<circle" in one


def test_stack_chart_sums() -> None:
    x = np.arange(1.0, 4.0)
    text = stack_chart("t", [Series("a", x, x), Series("b", x, x)], "{:g}".format)
    low, high = (
        re.findall(rf'class="area s{i}" points="([^"]*)"', text)[0].split() for i in (0, 1)
    )
    assert low[:3] == high[::-1][:3]  # the upper area stands on the lower one
