"""One builder at a time, taken over when killed; full disks; processes that die (T13)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptm.common.errors import DataError, OutOfPages, StorageError
from ptm.data.child import Child
from ptm.data.lock import build_once
from tests.support.texts import documents, write_jsonl

ROOT = Path(__file__).parents[2]

OPEN = """
import json, resource, sys
from ptm.common.errors import PtmError
from ptm.data import lock, prepare
from ptm.data.config import DataConfig
from ptm.data.corpus import open_corpus
settings = json.loads(sys.argv[1])
lock.HEARTBEAT_S = 0.3
prepare.MIN_SHARD_BYTES = settings.pop("shard_bytes", 50_000)
if limit := settings.pop("file_bytes", 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    corpus = open_corpus(DataConfig(**settings), vocab_size=400, seed=0)
except PtmError as e:
    sys.exit(f"{e.exit_code} {e}")
print(json.dumps(corpus.report()))
"""


@pytest.fixture
def settings(tmp_path: Path, cache: Path, tokenizer_file: str) -> dict[str, object]:
    path = write_jsonl(tmp_path / "a.jsonl", documents(9000))
    return {"source": str(path), "cache_dir": str(cache), "tokenizer": tokenizer_file}


def start(settings: dict[str, object], **changes: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, json.dumps({**settings, **changes})]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def wait_for_shards(cache: Path, count: int) -> Path:
    """The folder in which a builder has finished `count` shards."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done = list(cache.glob("corpora/*.partial/shard-*.json"))
        if len(done) >= count:
            return done[0].parent
        time.sleep(0.005)
    raise AssertionError("no shard in a minute")


def test_one_builds_and_the_others_wait(settings: dict[str, object], cache: Path) -> None:
    builder = start(settings)
    wait_for_shards(cache, 1)
    builder.send_signal(signal.SIGSTOP)  # long enough for the others to come, however fast it is
    others = [start(settings) for _ in range(3)]
    told = [first_line_of(other) for other in others]
    builder.send_signal(signal.SIGCONT)
    ended = [process.communicate(timeout=100) for process in (builder, *others)]
    reports = [json.loads(out) for out, _ in ended]
    assert [r["sources"][0].pop("was_built") for r in reports] == [True] + [False] * 3
    assert all(r == reports[0] for r in reports)
    assert all(f"data: waiting for process {builder.pid} on" in text for text in told)
    assert all("to finish (" in text for text in told)


def first_line_of(process: subprocess.Popen[str]) -> str:
    """What a process says first on stderr; the test's time limit ends a wait for nothing."""
    assert process.stderr is not None
    return process.stderr.readline()


def test_killed_builder_is_taken_over_and_its_shards_are_used(
    settings: dict[str, object], cache: Path, tmp_path: Path
) -> None:
    builder = start(settings, workers=1)
    partial = wait_for_shards(cache, 3)
    second = start(settings)
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    made = {p: p.stat().st_mtime_ns for p in partial.glob("shard-*.json")}
    out, err = second.communicate(timeout=100)
    report = json.loads(out)
    assert report["sources"][0]["was_built"], err
    folder = Path(report["sources"][0]["folder"])
    reused = [p for p, at in made.items() if (folder / p.name).stat().st_mtime_ns == at]
    assert len(reused) >= 3 and not partial.exists() and not list(folder.glob("*.tmp-*"))
    clean = start(settings, cache_dir=str(tmp_path / "clean"))
    expected = Path(json.loads(clean.communicate(timeout=100)[0])["sources"][0]["folder"])
    names = sorted(p.name for p in expected.iterdir())
    assert names == sorted(p.name for p in folder.iterdir())
    assert all((folder / n).read_bytes() == (expected / n).read_bytes() for n in names)


def test_interrupt_ends_the_workers(settings: dict[str, object], cache: Path) -> None:
    builder = start(settings)
    wait_for_shards(cache, 1)
    children = [
        int(p.name)
        for p in Path("/proc").glob("[0-9]*")
        if f"\nPPid:\t{builder.pid}\n" in read(p / "status")
    ]
    assert children
    builder.send_signal(signal.SIGINT)
    builder.communicate(timeout=10)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_full_disk_is_told_and_leaves_no_corpus(settings: dict[str, object], cache: Path) -> None:
    process = start(settings, file_bytes=100_000, shard_bytes=1_000_000)
    _, err = process.communicate(timeout=100)
    told = err.splitlines()[-1]
    assert told.startswith("74 data.cache_dir=") and "(File too large); free" in told
    assert not list(cache.glob("corpora/*/index.json"))
    out, _ = start(settings).communicate(timeout=100)  # once there is room
    assert json.loads(out)["train_documents"] > 8500


def test_build_once_waits_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptm.data.lock.GRACE_S", 0.3)
    built: list[str] = []

    def build() -> str:
        built.append("done")
        return "done"

    def finished() -> str | None:
        return "done" if built else None

    begun = time.monotonic()
    assert build_once(tmp_path / "lock", finished, build, is_builder=False) == "done"
    assert time.monotonic() - begun >= 0.3  # nobody came, so it built itself
    assert build_once(tmp_path / "lock", finished, build) == "done" and built == ["done"]


def test_child_results_errors_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    module = "tests.support.child_task"
    with Child(module, memory_bytes=1 << 30) as child:
        reported: list[object] = []
        assert child.call({"do": "twice", "n": 4}, what="n", report=reported.append) == 8
        assert reported == ["half way"]
        for what, kind, text in (
            ("data", DataError, "no good"),
            ("disk", StorageError, "No space left on device"),
            ("memory", OutOfPages, "out of memory"),
        ):
            with pytest.raises(kind, match=text):
                child.call({"do": what}, what="x")
        with pytest.raises(DataError, match=r"data=spin: took too long \(0.2 s\)"):
            child.call({"do": "spin"}, what="spin", time_s=0.2)
    for what, kind, text in (
        ("kill", OutOfPages, "killed, most likely for want of memory"),
        ("exit", DataError, r"crashed its process \(exit 3\)"),
    ):
        with Child(module) as child, pytest.raises(kind, match=text):
            child.call({"do": what}, what="x")


def test_child_ends_with_its_parent() -> None:
    code = (
        "from ptm.data.child import Child; import os; c = Child('ptm.data.shard'); "
        "print(c.process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout)
    deadline = time.monotonic() + 20
    while "State:\tZ" not in (status := read(Path(f"/proc/{pid}/status"))) and status:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)
