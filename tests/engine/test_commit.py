"""Commits against kills, power cuts, damage and disks that fail: what `restore` gives is exactly
what was committed, and never more than one commit is lost."""

import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from ptm.common.errors import CheckpointError, StorageError
from ptm.engine.commit import PageReader
from ptm.engine.disk import File
from ptm.engine.record import RecordLog
from ptm.engine.tier import SsdTier
from tests.support.pages import (
    PAGE,
    AnyPage,
    Failing,
    Volatile,
    fill,
    identity,
    new_store,
    reopened,
    store_on,
    value_of,
)

SHAPE = {"num_pages": 12, "durable": range(2, 10), "page_bytes": 64 * 1024}
SMALL = {"num_pages": 12, "durable": range(2, 10)}


def mixed(step: int, page: int) -> int:
    """What `page` holds at `step`: some pages change in every step, some seldom, one never."""
    if page == 2:
        return 0
    return step if page < 6 else step // page * page


def run_steps(store, first: int, last: int, *, seed: int = 0, wait: bool = False) -> None:
    """Steps first .. last - 1, each committed; reads and scratch writes go on in between."""
    chance = random.Random(seed)
    pages = [page for page in store.durable if page != 2]
    for step in range(first, last):
        chance.shuffle(pages)
        for page in pages:
            if mixed(step, page) != mixed(step - 1, page) or step == first:
                fill(store, page, mixed(step, page))
            if chance.random() < 0.3:
                fill(store, chance.choice([0, 1, 10, 11]), step)
                value_of(store, chance.choice(pages))
        store.commit(step, {"lr": step / 7})
        if wait:
            store.wait_commit()


def check_step(store, step: int) -> None:
    assert [value_of(store, p) for p in store.durable] == [mixed(step, p) for p in store.durable]


def test_a_step_is_restored_with_its_meta(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=5, **SMALL)
    run_steps(store, 1, 8)
    store.wait_commit()
    fill(store, 4, 99)  # after the commit: lost
    store.close()
    store = reopened(tmp_path, num_frames=5, **SMALL)
    assert store.records() == [(6, {"lr": 6 / 7}), (7, {"lr": 1.0})]
    store.restore(7)
    check_step(store, 7)
    assert value_of(store, 0) == 0  # scratch is not kept
    store.close()


@pytest.mark.parametrize("num_frames", [2, 5, 12])
def test_going_back_one_commit_and_on_again(tmp_path: Path, num_frames: int) -> None:
    store = new_store(tmp_path, num_frames=num_frames, **SMALL)
    run_steps(store, 1, 6, wait=True)
    store.close()
    for back in (4, 6, 8):
        store = reopened(tmp_path, num_frames=num_frames, **SMALL)
        assert [step for step, _ in store.records()] == [back, back + 1]
        store.restore(back)
        assert [step for step, _ in store.records()] == [back]
        check_step(store, back)
        run_steps(store, back + 1, back + 4, wait=True)
        store.close()


def test_all_ranks_meet_at_the_newest_common_step(tmp_path: Path) -> None:
    """One rank commits a step that another never reaches: both can restore the one before, even
    though the first went on to the next step and evicted what it could."""
    reached = threading.Event()

    def agree(step: int) -> None:
        if step == 4:
            reached.set()
            time.sleep(0.4)
            raise StorageError("the other rank is gone")

    ahead = new_store(tmp_path, num_frames=3, world=2, rank=0, store={"agree": agree}, **SMALL)
    behind = new_store(tmp_path, num_frames=3, world=2, rank=1, **SMALL)
    run_steps(behind, 1, 4)
    behind.close()
    run_steps(ahead, 1, 5)
    assert reached.wait(10)
    with pytest.raises(StorageError, match="the other rank is gone"):
        for page in [3, 4, 5, 6]:  # waits for a frame, as the first three may not be written now
            fill(ahead, page, 77)
    ahead.close()
    records = {}
    for rank in (0, 1):
        store = reopened(tmp_path, num_frames=4, world=2, rank=rank, **SMALL)
        records[rank] = [step for step, _ in store.records()]
        store.restore(3)
        check_step(store, 3)
        store.close()
    assert records == {0: [3, 4], 1: [2, 3]}


def test_writers_wait_for_the_flush_and_readers_do_not(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=8)
    go_on = threading.Event()
    write = store._ssd.write

    def slow(*args):
        go_on.wait(10)
        return write(*args)

    store._ssd.write = slow
    for page in range(8):
        fill(store, page, 1)
    store.commit(1, {})
    assert value_of(store, 5) == 1
    waiting = threading.Thread(target=lambda: fill(store, 5, 2))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive() and value_of(store, 5) == 1
    go_on.set()
    waiting.join()
    store.wait_commit()
    assert value_of(store, 5) == 2
    store.restore(1)
    assert [value_of(store, page) for page in range(8)] == [1] * 8
    store.close()


def test_nothing_is_recorded_before_its_pages_are_synced(tmp_path: Path) -> None:
    """40 power cuts, each of which loses half of what was not synced, in no order."""
    for seed in range(40):
        Volatile.files = []
        path = tmp_path / str(seed)
        chance = random.Random(seed)
        ssd = SsdTier.create(path, identity(**SMALL), open_file=Volatile)
        store = store_on(ssd, num_frames=chance.choice([4, 12]), policy=AnyPage(seed))
        last = chance.randint(1, 6)
        run_steps(store, 1, last + 1, seed=seed, wait=chance.random() < 0.5)
        time.sleep(chance.random() * 0.01)
        with store._lock:  # nothing more reaches the disk
            steps = store._committer.num_commits
            Volatile.cut(chance)
        ssd.lock.close()
        if steps == 0 and not RecordLog(path, run_id="run", rank=0).read():
            continue
        back = reopened(path, num_frames=6, **SMALL)
        newest, meta = back.records()[-1]
        assert newest >= steps and meta == {"lr": newest / 7}
        back.restore(newest)
        check_step(back, newest)
        back.close()


class Agreement:
    """What several ranks, here threads, have committed: none goes on before all have."""

    def __init__(self, world: int) -> None:
        self.steps, self.changed = [0] * world, threading.Condition()

    def of(self, rank: int):
        def agree(step: int) -> None:
            with self.changed:
                self.steps[rank] = max(self.steps[rank], step)
                self.changed.notify_all()
                self.changed.wait_for(lambda: min(self.steps) >= step)

        return agree


def newest_common(path: Path, world: int) -> int:
    """Newest step that all ranks have committed, 0 for none."""
    found = [PageReader.records(path, run_id="run", rank=rank) for rank in range(world)]
    return max(set.intersection(*({r.step for r in records} for records in found)), default=0)


def child(path: str, world: int, seed: int, started) -> None:
    """Ranks as threads that continue from the newest common commit until killed."""
    where, agreement = Path(path), Agreement(world)
    step = newest_common(where, world)
    stores = []
    for rank in range(world):
        options = {"policy": AnyPage(seed + rank), "agree": agreement.of(rank)}
        given = {"store": options, "num_frames": 5, "rank": rank, "world": world}
        if step:
            stores.append(reopened(where, **given, **SHAPE))
            stores[-1].restore(step)
        else:
            ssd = SsdTier.create(where, identity(rank=rank, world=world, **SHAPE), replace=True)
            stores.append(store_on(ssd, num_frames=5, **options))
    started.set()
    threads = [
        threading.Thread(target=run_steps, args=(store, step + 1, 10**6), kwargs={"seed": seed + i})
        for i, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()


@pytest.mark.parametrize(
    ("world", "kills"), [(1, 40), (2, 40), pytest.param(3, 300, marks=pytest.mark.slow)]
)
def test_a_kill_at_any_time_costs_at_most_one_commit(
    tmp_path: Path, world: int, kills: int
) -> None:
    """Kills of one run that goes on each time from where it was. After each, all ranks have a step
    in common, not older than that after the kill before, and all its pages are whole. A machine
    whose commits take longer is given longer: half of the kills shall come after a commit."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.test_commit"])
    common, window = 0, 0.06
    for kill in range(kills):
        started = context.Event()
        process = context.Process(target=child, args=(str(tmp_path), world, kill, started))
        process.start()
        assert started.wait(60)
        time.sleep(random.Random(kill).random() * window)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = newest_common(tmp_path, world)
        newest = [PageReader.records(tmp_path, run_id="run", rank=rank) for rank in range(world)]
        assert found >= common and all(r[-1].step <= found + 1 for r in newest if r)
        window = max(0.06, window * (1.1 if found == common else 1 / 1.1))
        common = found
        for rank in range(world if common else 0):
            reader = PageReader(tmp_path, run_id="run", rank=rank, step=common)
            for page in SHAPE["durable"]:
                values = reader.read(page).view(torch.int64)
                assert bool((values == mixed(common, page)).all()), f"{page=} {rank=} {kill=}"
            reader.close()
    assert common > kills // 3


def used_slots(path: Path) -> list[int]:
    """Offsets of the slots that the newest record names."""
    record = PageReader.records(path, run_id="run", rank=0)[-1]
    at = record.identity
    return [at.offset(p, record.slots[p - 2]) for p in at.durable if record.slots[p - 2] != 255]


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


def committed(path: Path) -> Path:
    store = new_store(path, num_frames=5, **SMALL)
    run_steps(store, 1, 4, wait=True)
    store.close()
    return path / "run"


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_byte_in_a_page_is_named(tmp_path: Path, seed: int) -> None:
    files = committed(tmp_path)
    chance = random.Random(seed)
    offset = chance.choice(used_slots(tmp_path))
    flip(files / "rank-00000.pages", offset + chance.randrange(PAGE))
    what = {"describe": lambda page: f"blocks.{page}.weight"}
    store = reopened(tmp_path, num_frames=5, store=what, **SMALL)
    store.restore(3)
    match = rf"rank-00000.pages: page (\d+) at byte {offset} \(blocks.\1.weight\) is not what was"
    with pytest.raises(CheckpointError, match=match):
        check_step(store, 3)
    store.close()
    reader = PageReader(tmp_path, run_id="run", rank=0, step=3, **what)
    with pytest.raises(CheckpointError, match=match):
        reader.verify()
    reader.close()


def test_a_flipped_byte_in_a_page_read_ahead_is_named(tmp_path: Path) -> None:
    files = committed(tmp_path)
    flip(files / "rank-00000.pages", used_slots(tmp_path)[0])
    store = reopened(tmp_path, num_frames=8, **SMALL)
    store.restore(3)
    store.prefetch(SMALL["durable"])
    with pytest.raises(CheckpointError, match=r"page 3 at byte \d+ \(page 3\)"):
        check_step(store, 3)
    store.close()


def test_a_flipped_byte_of_a_page_evicted_in_the_same_run_is_named(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_pages=2, num_frames=1)
    fill(store, 0, 1)
    fill(store, 1, 1)
    value_of(store, 0)
    time.sleep(0.05)
    flip(tmp_path / "run" / "rank-00000.pages", store._ssd.identity.offset(1, 0) + 9)
    with pytest.raises(CheckpointError, match="page 1 at byte 8192"):
        value_of(store, 1)
    store.close()


def test_a_flipped_byte_anywhere_in_a_record_is_named(tmp_path: Path) -> None:
    files = committed(tmp_path)

    def steps() -> list[int]:
        return [record.step for record in RecordLog(tmp_path, run_id="run", rank=0).read()]

    def is_of_step_3(path: Path) -> bool:  # times of two files may be equal
        flip(path, 0)
        left = steps()
        flip(path, 0)
        return left == [2]

    (path,) = filter(is_of_step_3, files.glob("*.record-*"))
    for offset in range(path.stat().st_size):
        flip(path, offset)
        log = RecordLog(tmp_path, run_id="run", rank=0)
        assert [record.step for record in log.read()] == [2]
        with pytest.raises(CheckpointError, match=rf"step 3 is not .*there: 2.*{path.name}: this"):
            log.find(3)
        flip(path, offset)
    assert RecordLog(tmp_path, run_id="run", rank=0).find(3).step == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("after", [0, 3, 7, 8, 12])
def test_a_failing_disk_ends_the_commit_and_not_the_one_before(
    tmp_path: Path, code: int, after: int
) -> None:
    Failing.error, Failing.after = code, 8  # seven pages and a record
    ssd = SsdTier.create(tmp_path, identity(**SMALL), open_file=Failing)
    store = store_on(ssd, num_frames=12)
    run_steps(store, 1, 2, wait=True)
    Failing.after = after
    with pytest.raises(StorageError, match="engine.ssd_path=.*cannot be written") as caught:
        run_steps(store, 2, 8, wait=True)
    assert caught.value.exit_code == 74
    with pytest.raises(StorageError):
        store.wait_commit()
    store.close()
    Failing.error = errno.ENOSPC
    back = reopened(tmp_path, num_frames=12, **SMALL)
    newest = back.records()[-1][0]
    back.restore(newest)
    check_step(back, newest)
    back.close()


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"world": 2}, "is of world=1, this run has world=2"),
        ({"ep": 2, "world": 2}, "is of world=1, this run has world=2"),
        ({"layout": "x"}, "is of layout=layout-1, this run has layout=x"),
        ({"page_bytes": 8192}, "is of page_bytes=4096, this run has page_bytes=8192"),
        ({"num_pages": 13}, "is of num_pages=12, this run has num_pages=13"),
        ({"durable": range(2, 9)}, "is of durable_stop=10, this run has durable_stop=9"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_files_of_another_run_are_refused(tmp_path: Path, changed: dict, match: str) -> None:
    committed(tmp_path)
    with pytest.raises(CheckpointError, match=match) as caught:
        SsdTier.open_existing(tmp_path, identity(**SMALL | changed))
    assert "\n" not in str(caught.value)


def test_files_under_the_name_of_another_run_are_refused(tmp_path: Path) -> None:
    committed(tmp_path).rename(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is of run_id=run, this run has run_id=other"):
        SsdTier.open_existing(tmp_path, identity(**SMALL, run_id="other"))


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ptm.engine.record.FORMAT", 9)
        committed(tmp_path)
    with pytest.raises(CheckpointError, match="is written in format 9, this ptm reads format 1"):
        SsdTier.open_existing(tmp_path, identity(**SMALL))


def test_a_shortened_page_file_is_refused(tmp_path: Path) -> None:
    files = committed(tmp_path)
    os.truncate(files / "rank-00000.pages", PAGE)
    with pytest.raises(CheckpointError, match="is 4096 bytes long, its record says 81920"):
        SsdTier.open_existing(tmp_path, identity(**SMALL))


def test_commits_are_not_overwritten_unasked(tmp_path: Path) -> None:
    committed(tmp_path)
    with pytest.raises(CheckpointError, match="holds step 3 of run run, which would be lost"):
        SsdTier.create(tmp_path, identity(**SMALL))
    store = store_on(SsdTier.create(tmp_path, identity(**SMALL), replace=True), num_frames=3)
    assert store.records() == []
    assert value_of(store, 4) == 0
    store.close()


def test_a_reader_reads_beside_the_run(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=4, **SMALL)
    run_steps(store, 1, 4, wait=True)
    reader = PageReader(tmp_path, run_id="run", rank=0, step=3)
    run_steps(store, 4, 5)
    assert [int(reader.read(page)[0]) for page in SMALL["durable"]] == [
        mixed(3, page) for page in SMALL["durable"]
    ]
    assert (reader.identity.layout, reader.record.meta) == ("layout-1", {"lr": 3 / 7})
    reader.close()
    store.close()


def test_the_step_that_is_not_there_is_said(tmp_path: Path) -> None:
    committed(tmp_path)
    with pytest.raises(CheckpointError, match=r"step 9 is not committed here \(there: 2, 3\)"):
        PageReader(tmp_path, run_id="run", rank=0, step=9)


def test_a_file_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no committed step"):
        SsdTier.open_existing(tmp_path, identity())
    assert not list(tmp_path.iterdir())
    assert issubclass(Volatile, File)
