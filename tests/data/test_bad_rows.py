"""Every kind of bad row is found where it was planted, counted exactly, and refused or skipped."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from rich.console import Console

from ptm.common.errors import DataError
from ptm.data import job, reader
from ptm.data.config import DataConfig
from ptm.data.corpus import open_corpus
from ptm.data.reader import Bad, Document, Reader
from ptm.data.source import cut, find
from tests.support.texts import documents, write_jsonl

GOOD = b'{"text": "good"}\n'

# What a .jsonl holds, the lines that are bad, and what is said of them.
LINES = {
    "plain": (GOOD * 3, {}),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD * 2, {}),
    "crlf": (GOOD.replace(b"\n", b"\r\n") * 2, {}),
    "blank lines": (GOOD + b"\n  \n" + GOOD, {}),
    "extra key": (b'{"text": "good", "more": [1]}\n' + GOOD, {}),
    "no line end": (GOOD + GOOD.strip(), {}),
    "not json": (GOOD + b"hello\n" + GOOD, {2: "not JSON"}),
    "trailing comma": (GOOD + b'{"text": "a",}\n', {2: "not JSON"}),
    "cut off": (GOOD + b'{"text": "a', {2: "not JSON"}),
    "nested": (GOOD + b'{"text":' + b"[" * 50_000 + b"\n", {2: "not JSON: nested"}),
    "huge number": (GOOD + b'{"text": ' + b"9" * 5000 + b"}\n", {2: "not JSON"}),
    "not an object": (GOOD + b'["text"]\n"text"\n', {2: "a list", 3: "a string"}),
    "no text": (b'{"txt": "a"}\n' + GOOD, {1: "no key 'text'"}),
    "null": (b'{"text": null}\n' + GOOD, {1: "'text' is null"}),
    "number": (GOOD + b'{"text": 3}\n', {2: "'text' is a number"}),
    "object": (GOOD + b'{"text": {"a": 1}}\n', {2: "'text' is an object"}),
    "empty text": (GOOD + b'{"text": ""}\n{"text": " \\n"}\n', {2: "empty", 3: "empty"}),
    "not utf-8": (GOOD + b'{"text": "\xff"}\n' + GOOD, {2: "not UTF-8 at byte 10"}),
    "utf-16": (GOOD.decode().encode("utf-16"), {1: "not UTF-8", 2: "not JSON"}),
    "nul escaped": (GOOD + b'{"text": "a\\u0000"}\n', {2: "NUL character at 1"}),
    "nul raw": (GOOD + b'{"text": "a\x00"}\n', {2: "not JSON"}),
    "surrogate": (GOOD + b'{"text": "\\ud800"}\n', {2: "surrogate"}),
}


def read(path: Path, piece_bytes: int = 1 << 40) -> tuple[list[Document], list[Bad], int]:
    good, bad, lines = [], [], 0
    for piece in cut(find(str(path)), piece_bytes):
        rows = Reader(piece, "text")
        for one in rows:
            at = one._replace(line=one.line + lines)
            bad.append(at) if isinstance(at, Bad) else good.append(at)
        lines += rows.lines
    return good, bad, lines


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("packing", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_lines_of_jsonl(tmp_path: Path, kind: str, packing: str) -> None:
    content, expected = LINES[kind]
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[packing]
    path = tmp_path / f"a.{packing}"
    path.write_bytes(pack(content))
    good, bad, _ = read(path)
    assert {b.line: b.num_rows for b in bad} == dict.fromkeys(expected, 1)
    assert all(expected[b.line] in b.reason for b in bad)
    assert {d.text for d in good} <= {"good"}
    assert len(good) + len(bad) == len([x for x in content.split(b"\n") if x.strip()])


def test_pieces_of_jsonl_are_the_file(tmp_path: Path) -> None:
    texts = documents(40, least=0, most=30)
    content = "".join(json.dumps({"text": t}) + "\n" * (1 + i % 2) for i, t in enumerate(texts))
    content += "bad\n"
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    last = content.count("\n")
    for size in (1, 7, 100, 1000, 10**6):
        good, bad, lines = read(path, size)
        assert [d.text for d in good] == texts
        assert [b.line for b in bad] == [last] and lines == last


def test_line_of_100_mb_is_skipped_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as f:
        f.write(GOOD + b'{"text": "')
        for _ in range(100):
            f.write(b"x" * 1_000_000)
        f.write(b'"}\n' + GOOD)
    code = (
        "import re, sys; from ptm.data.reader import Reader; "
        "from ptm.data.source import cut, find\n"
        "for p in cut(find(sys.argv[1]), 1 << 40):\n"
        "    print([type(one).__name__ + str(one.line) for one in Reader(p, 'text')])\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    said = subprocess.check_output([sys.executable, "-c", code, str(path)], text=True, cwd=ROOT)
    rows, peak_kib = said.splitlines()
    assert rows == "['Document1', 'Bad2', 'Document3']"
    assert int(peak_kib) < 300 << 10  # 64 MiB of a line, twice, and Python


def test_line_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_TEXT_BYTES", 1 << 20)
    monkeypatch.setattr(reader, "MAX_SKIP_BYTES", 8 << 20)
    for packing, compress in (("gz", gzip.compress), ("zst", zstandard.compress)):
        path = tmp_path / f"a.jsonl.{packing}"
        path.write_bytes(compress(GOOD + b"x" * (32 << 20) + b"\n" + GOOD))
        good, bad, _ = read(path)
        assert [d.line for d in good] == [1]
        assert [(b.line, b.reason.split(";")[0]) for b in bad] == [(2, "line without end")]


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_truncated_and_flipped_archives(tmp_path: Path, packing: str) -> None:
    lines = "".join(json.dumps({"text": t}) + "\n" for t in documents(3000)).encode()
    compress = gzip.compress if packing == "gz" else zstandard.ZstdCompressor(write_checksum=True)
    whole = compress(lines) if packing == "gz" else compress.compress(lines)
    path = tmp_path / f"a.jsonl.{packing}"
    path.write_bytes(whole)
    assert len(read(path)[0]) == 3000 and not read(path)[1]
    path.write_bytes(whole + whole)  # archives may be joined
    assert len(read(path)[0]) == 6000 and not read(path)[1]
    for size in (1, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        _, bad, _ = read(path)
        assert len(bad) <= 2 and f"damaged .jsonl.{packing} file" in bad[-1].reason
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :])
    assert f"damaged .jsonl.{packing} file" in read(path)[1][-1].reason


def parquet(path: Path, column: pa.Array, **options: object) -> Path:
    ids = pa.array(range(len(column)))
    pq.write_table(pa.table({"id": ids, "text": column}), path, **options)
    return path


def test_parquet(tmp_path: Path) -> None:
    rows = ["a", None, "", "b", "nul\0", "c"]
    path = parquet(tmp_path / "a.parquet", pa.array(rows), row_group_size=2)
    for size in (1, 1 << 40):
        good, bad, lines = read(path, size)
        assert [(d.line, d.text) for d in good] == [(1, "a"), (4, "b"), (6, "c")] and lines == 6
        assert [b.line for b in bad] == [2, 3, 5]
        assert "null" in bad[0].reason and "empty" in bad[1].reason and "NUL" in bad[2].reason
    kinds = [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    for kind in kinds:
        path = parquet(tmp_path / "b.parquet", pa.array(["a", "b"]).cast(kind))
        assert [d.text for d in read(path)[0]] == ["a", "b"]


def test_parquet_that_is_not_text(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", pa.array([1, 2, 3]))
    assert [(b.num_rows, b.reason) for b in read(path)[1]] == [
        (3, "column 'text' is int64, not a string")
    ]
    pq.write_table(pa.table({"other": ["a"]}), path)
    assert read(path)[1] == [Bad(1, "no column 'text'", 1)]
    bytes_as_text = pa.array([b"ok", b"\xff"]).view(pa.string())
    assert [b.reason for b in read(parquet(path, bytes_as_text))[1]] == ["not UTF-8 at byte 0"]
    whole = parquet(path, pa.array(documents(100))).read_bytes()
    for size in (3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        _, bad, _ = read(path)
        assert len(bad) == 1 and "damaged .parquet" in bad[0].reason
        assert "\n" not in bad[0].reason


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "a.txt").write_bytes(b"first\n\nsecond \xff")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b" \n")
    (tmp_path / "e.txt").write_bytes(b"a\0b")
    (tmp_path / "notes.md").write_text("is not a source")
    (tmp_path / "f.txt").symlink_to(tmp_path / "f.txt")
    (tmp_path / "g").symlink_to(tmp_path)
    (tmp_path / "h.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "i.txt")
    found = {p.file.name: [*Reader(p, "text")] for p in cut(find(str(tmp_path)), 9)}
    assert list(found) == sorted(found)
    assert found.pop("b.txt") == [Document(1, "one\ntwo\n")]
    reasons = {name: (one.line, one.reason) for name, [one] in found.items()}
    assert reasons == {
        "a.txt": (3, "not UTF-8 at byte 14"),
        "c.txt": (1, "empty file"),
        "d.txt": (1, "empty text"),
        "e.txt": (1, "NUL character at 1"),
        "f.txt": (1, "symbolic link loop"),
        "g": (1, "symbolic link loop"),
        "h.txt": (1, "cannot be opened: No such file or directory"),
        "i.txt": (1, "not a regular file"),
    }


def plant(folder: Path) -> int:
    """Files with every kind of bad row; returns how many there are."""
    planted = 0
    for kind, (content, expected) in LINES.items():
        (folder / f"{kind}.jsonl").write_bytes(content.replace(b"good", f"good {kind}".encode()))
        planted += len(expected)
    parquet(folder / "a.parquet", pa.array(["a", None, "", "b"]))
    parquet(folder / "b.parquet", pa.array([1, 2, 3]))
    (folder / "empty.jsonl").touch()
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD * 9)[:-9])
    write_jsonl(folder / "ids.jsonl", ["a doc", "another"], id="same")
    return planted + 2 + 3 + 1 + 1 + 1


def test_ledger_equals_what_was_planted(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    planted = plant(folder)
    write_jsonl(folder / "good.jsonl", documents(200))
    config = DataConfig(source=(str(folder),), cache_dir=str(cache), max_bad_fraction=0.5)
    corpus = open_corpus(config, vocab_size=300, seed=0)
    [ledger] = corpus.report()["sources"]
    assert ledger["bad_rows"] == planted and ledger["duplicate_ids"] == 1
    [listed] = [one.ledger["bad"] for one in corpus.prepared]

    # `check` reads the same files in another way and lists every one of them.
    counts = job.check(config, Console(soft_wrap=True, highlight=False))[str(folder)]
    assert counts["bad_rows"] == planted and counts["duplicate_ids"] == 1
    assert counts["documents"] == ledger["documents"]
    out = capsys.readouterr().out
    assert [f"{path}:{number}: {reason}" for path, number, reason in listed] == [
        text for text in out.splitlines() if re.search(r":\d+: (?!id )", text)
    ]
    assert f"{folder}/ids.jsonl:2: id 'same' was seen before, at {folder}/ids.jsonl:1" in out

    # The same corpus under stricter recipes.
    strict = {"bad_rows": "fail"}, {"max_bad_fraction": 0.05}
    for changes in strict:
        settings = {"source": config.source, "cache_dir": str(cache), **changes}
        with pytest.raises(DataError, match=f"{planted} of .* first {folder}/.*:[0-9]+: ") as e:
            open_corpus(DataConfig(**settings), vocab_size=300, seed=0)
        assert e.value.exit_code == 4 and "\n" not in str(e.value)


def test_fail_stops_at_the_first_bad_row_by_file_and_line(tmp_path: Path, cache: Path) -> None:
    texts = documents(300)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_text(path.read_text().replace('{"text": "0.250', '{"text" "0.250'))
    config = DataConfig(source=(str(path),), cache_dir=str(cache), bad_rows="fail")
    with pytest.raises(DataError, match=rf"data.bad_rows=fail: 1 of .* first {path}:251: not JSON"):
        open_corpus(config, vocab_size=300, seed=0)


def test_only_bad_rows(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no\n" * 20)
    config = DataConfig(source=(str(tmp_path),), cache_dir=str(cache), max_bad_fraction=1.0)
    with pytest.raises(DataError, match="no usable document.*not JSON"):
        open_corpus(config, vocab_size=300, seed=0)


def test_no_file(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(DataError, match=r"no file ending in \.txt"):
            find(str(source))
    with pytest.raises(DataError, match=r"gone\.jsonl: does not exist"):
        find(str(tmp_path / "gone.jsonl"))


def test_standard_library_in_order() -> None:
    names = [f.name for f in find("python_stdlib")]
    assert names == sorted(names) and "argparse.py" in names and len(names) > 300
    assert not any("site-packages" in name for name in names)


ROOT = Path(__file__).parents[2]
