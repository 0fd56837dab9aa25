"""Disks that are full, too small or read-only, limits that bite in the middle of a run, and runs
that move to other ranks by their page files."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.run.test_page_kills import LARGER, events, is_alive
from tests.run.test_page_settings import lines
from tests.run.test_resume import last_step, ranks_of
from tests.support import runs

pytestmark = pytest.mark.slow
STEPS = 16


def words(folder: Path, ssd: Path, text: Path, **changes: Any) -> list[str]:
    keys = LARGER | {"train.steps": STEPS, "checkpoint.interval": 1000, "engine.ssd_path": ssd}
    return runs.words(folder, text, **keys | changes)


def begin(world: int, words: list[str], cache: Path, out: Path) -> subprocess.Popen[str]:
    with out.open("w") as file:
        return subprocess.Popen(
            runs.command(world, words),
            env=runs.environment(cache),
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )


def errors(said: str) -> list[str]:
    """Lines of stderr that are not about the making of the data."""
    return [line for line in lines(said) if not line.startswith(("data:", "tokenizing"))]


def wait_for(step: int, folder: Path, agent: subprocess.Popen[str], out: Path) -> None:
    while last_step(folder) < step:
        assert agent.poll() is None, out.read_text(errors="replace")[-3000:]
        time.sleep(0.005)


@contextlib.contextmanager
def disk(image: Path, mebibytes: int) -> Iterator[Path]:
    """A small ext4 disk. Skips where that may not be mounted."""
    mount = image.with_suffix(".mount")
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(mebibytes << 20)
    if not shutil.which("mkfs.ext4") or os.getuid():
        pytest.skip("needs mkfs.ext4 and root")
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(mount)]).returncode:
        pytest.skip("cannot mount an image here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_too_small_is_refused(text: Path, cache: Path, tmp_path: Path) -> None:
    with disk(tmp_path / "small.img", 24) as mount:
        before = sorted(p.name for p in mount.iterdir())
        done = runs.launch(2, words(tmp_path / "run", mount, text), cache)
        assert done.returncode in (3, 74), done.stderr
        assert "engine.ssd" in done.stderr or "free on the disk" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(p.name for p in mount.iterdir()) == before
    assert not (tmp_path / "run").exists()


def test_a_read_only_disk_is_refused(text: Path, cache: Path, tmp_path: Path) -> None:
    with disk(tmp_path / "read-only.img", 64) as mount:
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        done = runs.launch(2, words(tmp_path / "run", mount, text), cache)
    assert done.returncode == 74 and len(errors(done.stderr)) == 1, done.stderr
    assert "is not writable; name a writable folder" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_in_the_middle_stops_nothing(
    text: Path, cache: Path, tmp_path: Path
) -> None:
    """All that a run will write to it was allocated before the first step."""
    with disk(tmp_path / "fills.img", 80) as mount:
        out = tmp_path / "out.txt"
        agent = begin(2, words(tmp_path / "run", mount, text), cache, out)
        wait_for(4, tmp_path / "run", agent, out)
        with contextlib.suppress(OSError), (mount / "junk").open("wb") as junk:
            while True:
                junk.write(b"x" * (1 << 20))
                junk.flush()
        assert agent.wait(timeout=200) == 0, out.read_text(errors="replace")[-3000:]


def test_no_room_for_the_page_file_leaves_nothing_behind(
    text: Path, cache: Path, tmp_path: Path
) -> None:
    ssd = tmp_path / "ssd"
    done = subprocess.run(
        runs.command(2, words(tmp_path / "run", ssd, text)),
        env=runs.environment(cache),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20)),
    )
    assert done.returncode == 74, done.stderr
    assert len(errors(done.stderr)) == 1 and "raise the limit on file sizes" in done.stderr
    assert not (tmp_path / "run").exists() and not list(ssd.rglob("*"))


def test_a_write_that_fails_in_the_middle_keeps_the_last_commit(
    text: Path, cache: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    agent = begin(2, words(folder, tmp_path / "ssd", text), cache, out)
    wait_for(5, folder, agent, out)
    resource.prlimit(ranks_of(agent)[1], resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
    assert agent.wait(timeout=120) == 74, out.read_text(errors="replace")[-3000:]
    said = [line for line in lines(out.read_text(errors="replace")) if "cannot be written" in line]
    assert len(said) == 1 and "engine.ssd_path=" in said[0], out.read_text(errors="replace")[-1500:]
    before = last_step(folder)
    done = runs.launch(2, words(folder, tmp_path / "ssd", text), cache)
    assert done.returncode == 0, done.stderr
    assert events(folder, "resume")[-1]["step"] >= before - 1
    whole = runs.launch(2, words(tmp_path / "whole", tmp_path / "whole-ssd", text), cache)
    assert whole.returncode == 0, whole.stderr
    assert runs.digests(folder, STEPS) == runs.digests(tmp_path / "whole", STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_in_the_middle_of_a_commit(
    number: int, text: Path, cache: Path, tmp_path: Path
) -> None:
    folder, ssd, out = tmp_path / "run", tmp_path / "ssd", tmp_path / "out.txt"
    agent = begin(2, words(folder, ssd, text, **{"train.steps": 500}), cache, out)
    wait_for(6, folder, agent, out)
    agent.send_signal(number)
    assert agent.wait(timeout=120) == 75, out.read_text(errors="replace")[-3000:]
    assert "Traceback" not in out.read_text(errors="replace")
    stopped = last_step(folder)
    more = {"train.steps": stopped + 2, "train.schedule": "constant"}
    done = runs.launch(2, words(folder, ssd, text, **more), cache)
    assert done.returncode == 0 and f"resuming after step {stopped} from" in done.stdout


def moved_rows(got: dict[str, Any], expected: dict[str, Any]) -> list[int]:
    """Of 512 tokens with 2 experts each, rows that went to another expert, layer by layer."""
    shares = [
        (got["expert_load"][layer]["share"], of["share"])
        for layer, of in expected["expert_load"].items()
    ]
    return [round(sum(abs(x - y) for x, y in zip(*pair)) * 1024 / 2) for pair in shares]


def test_a_run_moves_by_its_page_files(text: Path, cache: Path, tmp_path: Path) -> None:
    """2 ranks -> 1 -> 4 with ep 2 -> 2 with ep 2, killed each time, without any checkpoint."""
    folder, ssd, out = tmp_path / "run", tmp_path / "ssd", tmp_path / "out.txt"
    keys = {"engine.cpu_bytes": "27MiB", "train.micro_batch_size": 1}
    for world, ep, until in ((2, 1, 4), (1, 1, 8), (4, 2, 12)):
        agent = begin(world, words(folder, ssd, text, **keys | {"engine.ep": ep}), cache, out)
        wait_for(until, folder, agent, out)
        ranks = ranks_of(agent)
        for pid in [agent.pid, *ranks]:
            os.kill(pid, signal.SIGKILL)
        agent.wait()
        while any(is_alive(rank) for rank in ranks):
            time.sleep(0.01)
        assert not list((folder / "checkpoints").glob("step-*"))
    done = runs.launch(2, words(folder, ssd, text, **keys | {"engine.ep": 2}), cache)
    assert done.returncode == 0, done.stderr
    resumed = [event["step"] for event in events(folder, "resume")]
    assert len(resumed) == 3 and all(a >= b - 1 for a, b in zip(resumed, (4, 8, 12)))
    straight = runs.launch(2, words(tmp_path / "straight", tmp_path / "s", text, **keys), cache)
    assert straight.returncode == 0, straight.stderr
    has_flipped = False
    for got, expected in zip(runs.log(folder), runs.log(tmp_path / "straight"), strict=True):
        assert got["tokens"] == expected["tokens"]
        moved = moved_rows(got, expected)
        if any(moved) and not has_flipped:  # a near-tie of the router that other sums decide
            has_flipped = next(rows for rows in moved if rows) <= 2
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-3 if has_flipped else 1e-6)
    assert [path.name.rpartition(".")[2] for path in ssd.iterdir()] == ["n2e2"]
