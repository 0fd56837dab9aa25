"""Page files that were damaged, lost, mixed up or written by other settings, and settings that
cannot be: the right code, one line, nothing lost, nothing left behind.

Each case begins with a copy of one run on 2 ranks (or 1), killed some steps after its checkpoint.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ptm.cli import run as run_here
from ptm.engine.record import NO_SLOT, Record, RecordLog, rank_file
from tests.run.test_page_kills import LARGER, is_alive
from tests.run.test_resume import last_step, ranks_of
from tests.support import runs

pytestmark = pytest.mark.slow
STEPS, SAVED, KILLED = 16, 8, 11
KEYS = LARGER | {"train.steps": STEPS, "checkpoint.interval": SAVED}


class Copy(NamedTuple):
    """A run's folder and its disk."""

    folder: Path
    ssd: Path
    text: Path
    cache: Path
    world: int

    @property
    def layout(self) -> str:
        return next(self.ssd.iterdir()).name

    def file(self, rank: int, kind: str) -> Path:
        return rank_file(self.ssd, self.layout, rank, kind)

    def records(self, rank: int) -> list[Record]:
        return RecordLog(self.ssd, run_id=self.layout, rank=rank).read()

    def words(self, **changes: Any) -> list[str]:
        keys = KEYS | {"engine.ssd_path": self.ssd} | changes
        if self.world == 1:
            keys |= {"engine.cpu_bytes": "27MiB"}
        return runs.words(self.folder, self.text, **keys)

    def start(self, **changes: Any) -> subprocess.CompletedProcess[str]:
        world = self.world if self.world > 1 else 0
        return runs.launch(world, self.words(**changes), self.cache)

    def fresh(self, to: Path) -> "Copy":
        shutil.copytree(self.folder, to / "run", symlinks=True)
        shutil.copytree(self.ssd, to / "ssd")
        return self._replace(folder=to / "run", ssd=to / "ssd")


def killed(world: int, text: Path, cache: Path, base: Path) -> Copy:
    """A run that was killed a few steps after its checkpoint."""
    copy = Copy(base / "run", base / "ssd", text, cache, world)
    command = runs.command(world if world > 1 else 0, copy.words(**{"train.steps": STEPS}))
    agent = subprocess.Popen(
        command, env=runs.environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while last_step(copy.folder) < KILLED:
        assert agent.poll() is None, agent.communicate()[1]
        time.sleep(0.002)
    ranks = ranks_of(agent) if world > 1 else []
    for pid in [agent.pid, *ranks]:
        os.kill(pid, signal.SIGKILL)
    agent.wait()
    while any(is_alive(rank) for rank in ranks):
        time.sleep(0.01)
    assert last_step(copy.folder) < STEPS
    return copy


@pytest.fixture(scope="module")
def two(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return killed(2, text, cache, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return killed(1, text, cache, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def whole(two: Copy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The hashes of a run on 2 ranks that nothing disturbed."""
    base = tmp_path_factory.mktemp("whole")
    done = two._replace(folder=base / "run", ssd=base / "ssd").start()
    assert done.returncode == 0, done.stderr
    return runs.digests(base / "run", STEPS)


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 4
    path.write_bytes(raw)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def assert_whole(done: subprocess.CompletedProcess[str], copy: Copy, whole: dict[str, Any]) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert runs.digests(copy.folder, STEPS) == whole


def test_a_flipped_byte_is_named_and_got_over(two: Copy, whole: Any, tmp_path: Path) -> None:
    copy = two.fresh(tmp_path)
    common = {r.step for r in copy.records(0)}  # rank 1 may be a step ahead
    newest = [r for r in copy.records(1) if r.step in common][-1]
    page = max(p for p in newest.identity.durable if newest.slots[p] != NO_SLOT)
    slot = newest.slots[page]
    offset = newest.identity.offset(page, slot)
    flip(copy.file(1, "pages"), offset + 4321)
    done = copy.start()
    assert done.returncode == 4, done.stderr
    named = [line for line in lines(done.stderr) if "not what was written" in line]
    assert len(named) == 1 and "Traceback" not in done.stderr, done.stderr
    path = re.escape(str(copy.file(1, "pages")))
    tensor = r"states of model\.[\w.]+"
    assert re.search(f"{path}: page {page} at byte {offset} \\({tensor}", named[0]), named
    again = copy.start()
    assert "is not what was written" in again.stdout
    assert re.search(r"resuming after step \d+ from", again.stdout), again.stdout
    assert_whole(again, copy, whole)
    assert not copy.file(1, "damaged").exists()


def test_a_damaged_record_falls_back_to_the_one_before(
    two: Copy, whole: Any, tmp_path: Path
) -> None:
    copy = two.fresh(tmp_path)
    # Rank 1 has the step before too, or else is itself a step behind.
    expected = {r.step for r in copy.records(1)} | {SAVED}
    newest = max(r.step for r in copy.records(0))
    path = next(p for p in _record_files(copy, 0) if _step_of(copy, p) == newest)
    flip(path, 40)
    done = copy.start()
    said = [line for line in done.stdout.splitlines() if "torn or damaged" in line]
    # Where rank 1 is a step ahead they have none in common, which is told with the reason again.
    said = [line for line in said if "is set aside" not in line]
    assert len(said) == 1 and str(path) in said[0], done.stdout
    found = re.search(r"resuming after step (\d+) from", done.stdout)
    assert found and int(found[1]) in expected, done.stdout
    if done.returncode == 4:
        # The kill came while the next step was writing over that step's pages, which nobody would
        # have needed again with a whole record. It is seen, and the checkpoint is there.
        assert "not what was written" in done.stderr and "goes on from what is whole" in done.stderr
        done = copy.start()
    assert_whole(done, copy, whole)


def _record_files(copy: Copy, rank: int) -> list[Path]:
    return [copy.file(rank, kind) for kind in ("record-a", "record-b")]


def _step_of(copy: Copy, path: Path) -> int:
    from ptm.engine.record import decode

    return decode(path.read_bytes(), path).step


def _lose_files(copy: Copy) -> None:
    for kind in ("pages", "record-a", "record-b"):
        copy.file(1, kind).unlink()


def _lose_pages(copy: Copy) -> None:
    copy.file(1, "pages").unlink()


def _swap_ranks(copy: Copy) -> None:
    a, b = copy.file(0, "pages"), copy.file(1, "pages")
    a.rename(a.with_suffix(".tmp"))
    b.rename(a)
    a.with_suffix(".tmp").rename(b)


def _both_records(copy: Copy) -> None:
    for path in _record_files(copy, 0):
        flip(path, 40)


def _cut(copy: Copy) -> None:
    os.truncate(copy.file(0, "pages"), 3 << 20)


@pytest.mark.parametrize("harm", [_lose_files, _lose_pages, _swap_ranks, _both_records, _cut])
def test_files_that_are_lost_or_mixed_up(harm: Any, two: Copy, whole: Any, tmp_path: Path) -> None:
    """The run goes back to its checkpoint and says so; what is left of the pages is kept."""
    copy = two.fresh(tmp_path)
    harm(copy)
    done = copy.start()
    if harm is _swap_ranks:  # seen when the first page is read
        assert done.returncode == 4 and len(lines(done.stderr)) >= 1
        assert "is not what was written" in lines(done.stderr)[0]
        done = copy.start()
    assert f"going back to the checkpoint of step {SAVED}" in done.stdout, done.stdout
    assert f"resuming after step {SAVED} from" in done.stdout
    assert list(copy.ssd.glob("*/rank-*.bad"))
    assert_whole(done, copy, whole)


def test_pages_of_an_older_moment_say_what_is_trained_again(
    two: Copy, whole: Any, tmp_path: Path
) -> None:
    copy = two.fresh(tmp_path)
    old = two.fresh(tmp_path / "old")
    done = copy.start()
    assert_whole(done, copy, whole)
    shutil.rmtree(copy.ssd)
    shutil.copytree(old.ssd, copy.ssd)
    shutil.rmtree(copy.folder / "checkpoints")
    done = copy.start()
    assert re.search(rf"steps \d+ to {STEPS} are trained again", done.stdout), done.stdout
    assert_whole(done, copy, whole)


def test_without_a_checkpoint_damaged_pages_are_not_thrown_away(one: Copy, tmp_path: Path) -> None:
    copy = one.fresh(tmp_path)
    shutil.rmtree(copy.folder / "checkpoints")
    for path in _record_files(copy, 0):
        flip(path, 40)
    before = {p.name: p.stat().st_size for p in copy.ssd.rglob("rank-*")}
    for _ in range(2):
        done = copy.start()
        assert done.returncode == 4 and len(lines(done.stderr)) == 1, done.stderr
        assert "there is no checkpoint to go on from" in done.stderr
    assert {p.name: p.stat().st_size for p in copy.ssd.rglob("rank-*")} == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"engine.page_mib": 2, "engine.cpu_bytes": "40MiB"}, "start with the engine.page_mib"),
        ({"train.precision": "bf16"}, "train.precision=bf16: the run in .* has train.precision="),
        ({"engine.moments": "int8"}, "train.precision, engine.moments and ptm that it was written"),
        ({"model.num_hidden_layers": 5}, "the run in .* has model.num_hidden_layers=6"),
        ({"resume": "never"}, "holds a run already and resume=never"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("has_checkpoint", [True, False], ids=["checkpoint", "pages-only"])
def test_other_settings_are_refused_and_change_nothing(
    changes: dict[str, Any],
    match: str,
    has_checkpoint: bool,
    one: Copy,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = one.fresh(tmp_path)
    monkeypatch.setenv("PTM_CACHE", str(copy.cache))
    if not has_checkpoint:
        shutil.rmtree(copy.folder / "checkpoints")
    before = {p: p.read_bytes() for p in copy.ssd.rglob("rank-*") if p.suffix != ".lock"}
    assert run_here(["train", *copy.words(**changes)]) in (2, 4)
    said = lines(capfd.readouterr().err)
    assert len(said) == 1 and re.search(match, said[0]), said
    assert {p: p.read_bytes() for p in copy.ssd.rglob("rank-*") if p.suffix != ".lock"} == before


def test_must_is_content_with_pages_alone(one: Copy, tmp_path: Path) -> None:
    copy = one.fresh(tmp_path)
    shutil.rmtree(copy.folder / "checkpoints")
    done = copy.start(resume="must")
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming after step 1\d from the pages", done.stdout)


def test_other_settings_take_over_where_a_checkpoint_is_as_new(one: Copy, tmp_path: Path) -> None:
    copy = one.fresh(tmp_path)
    assert copy.start().returncode == 0
    done = copy.start(**{"train.steps": STEPS + 2, "engine.page_mib": 2, "train.schedule": "cosine",
                         "engine.moments": "int8"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"written anew, as the checkpoint of step {STEPS} is as new" in done.stdout


def test_a_second_run_on_the_same_pages_is_refused(one: Copy, tmp_path: Path) -> None:
    """A copy of the run folder, which has the same run's name, started beside it."""
    copy = one.fresh(tmp_path)
    shutil.copytree(copy.folder, tmp_path / "twin")
    first = subprocess.Popen(
        runs.command(0, copy.words(**{"train.steps": 5000})),
        env=runs.environment(copy.cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while last_step(copy.folder) <= STEPS:
            assert first.poll() is None
            time.sleep(0.01)
        done = copy._replace(folder=tmp_path / "twin").start()
        assert done.returncode == 74 and len(lines(done.stderr)) == 1, done.stderr
        assert re.search("is in use by process .*; stop that run", done.stderr)
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize(
    ("changes", "code", "match"),
    [
        ({"engine.ssd_bytes": "1MiB"}, 3, r"needs .* per rank \(engine.ssd_bytes\), 1.00 MiB are"),
        ({"engine.cpu_bytes": "3MiB"}, 3, r"needs .* per rank \(engine.cpu_bytes\), 3.00 MiB are"),
        ({"engine.cpu_bytes": "12"}, 3, r"needs .* per rank \(engine.cpu_bytes\), 12 B are there"),
        ({"engine.cpu_bytes": "-1GiB"}, 2, "engine.cpu_bytes=-1GiB: must be a size in bytes"),
        ({"engine.cpu_bytes": "abc"}, 2, "write it like 80GiB or 512MiB"),
        ({"engine.gpu_bytes": "1GiB"}, 2, "engine.gpu_bytes=1GiB: there is no accelerator here"),
        ({"engine.ssd_path": "/dev/shm/ptm"}, 74, r"is memory \(tmpfs\), not a disk"),
        ({"engine.ssd_path": __file__}, 74, "is a file; name a folder"),
        ({"engine.ssd_path": "null", "engine.ssd_bytes": "1GiB"}, 2, "needs engine.ssd_path"),
        ({"engine.ep": 2}, 2, "engine.ep=2: must divide 1 ranks and 8 experts"),
        ({"engine.zero": 4}, 2, "engine.zero=4: must be >= 0 and <= 3"),
        ({"engine.journal_every": 0}, 2, "engine.journal_every=0: must be >= 1"),
        ({"engine.journal_every": 5, "checkpoint.interval": 0}, 2, "needs engine.journal_every=1"),
        ({"engine.update": "bouned"}, 2, "did you mean bounded?"),
        ({"engine.policy": "lur"}, 2, "did you mean lru?"),
        ({"engine.page_mib": 3}, 2, "must be a power of two"),
        ({"engine.ssd_pth": "/x"}, 2, "did you mean engine.ssd_path?"),
        ({"resume": "must"}, 4, "has no checkpoint and resume=must"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(
    changes: dict[str, Any],
    code: int,
    match: str,
    text: Path,
    cache: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, and a table where something does not fit; no folder that was not there."""
    monkeypatch.setenv("PTM_CACHE", str(cache))
    keys = KEYS | {"engine.cpu_bytes": "27MiB", "engine.ssd_path": tmp_path / "ssd"} | changes
    assert run_here(["train", *runs.words(tmp_path / "run", text, **keys)]) == code
    said = [x for x in lines(capfd.readouterr().err) if not x.startswith(("data:", "tokenizing"))]
    assert re.search(match, said[0]), said
    assert any("page file" in row for row in said) if code == 3 else len(said) == 1, said
    assert not (tmp_path / "run").exists() and not (tmp_path / "ssd").exists()
