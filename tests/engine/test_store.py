"""The page store against a plain dict of bytes, from one thread and from several."""

import gc
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from ptm.common.errors import OutOfPages, StorageError
from ptm.engine.eviction import Lru, NextUse
from ptm.engine.residency import Flush
from ptm.engine.schedule import make_schedule
from ptm.engine.tier import SsdTier
from ptm.engine.trace import UnitWork, step_phases, synthetic_trace
from tests.support.pages import (
    PAGE,
    AnyPage,
    Failing,
    Fetch,
    TinySchedule,
    fill,
    identity,
    new_store,
    store_on,
    value_of,
)

POLICIES = {"any": AnyPage, "lru": Lru, "next_use": NextUse}


def in_memory(num_pages: int = 4, **options):
    options = {"durable": range(num_pages), "page_bytes": PAGE, **options}
    return store_on(None, num_pages=num_pages, num_frames=num_pages, **options)


def random_bytes(chance: random.Random) -> torch.Tensor:
    return torch.frombuffer(bytearray(chance.randbytes(PAGE)), dtype=torch.uint8)


SEEDS = [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 150))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("policy", list(POLICIES))
def test_equals_a_dict(tmp_path: Path, policy: str, seed: int) -> None:
    """Held pages, several at once, with writes, prefetches, discards, commits and restores."""
    chance = random.Random(seed)
    num_pages, num_frames = chance.randint(2, 12), chance.randint(1, 6)
    start = chance.randint(0, num_pages)
    durable = range(start, chance.randint(start, num_pages))
    store = new_store(
        tmp_path,
        num_pages=num_pages,
        durable=durable,
        num_frames=num_frames,
        store={"policy": POLICIES[policy]()},
    )
    model = {page: bytes(PAGE) for page in range(num_pages)}
    committed: dict[int, dict[int, bytes]] = {}
    held: dict[int, tuple[torch.Tensor, bool]] = {}
    for step in range(400):
        kind = chance.choice(["hold"] * 4 + ["release"] * 4 + ["prefetch", "discard", "commit"])
        page = chance.randrange(num_pages)
        if kind == "hold" and page not in held and len(held) < min(num_frames, num_pages):
            write = chance.random() < 0.5
            data = store.hold(page, write=write)
            assert bytes(data.tolist()) == model[page], f"page {page} at {step}"
            if write:
                new = random_bytes(chance)
                data.copy_(new)
                model[page] = bytes(new.tolist())
            held[page] = (data, write)
        elif kind == "release" and held:
            page = chance.choice(list(held))
            data, write = held.pop(page)
            assert bytes(data.tolist()) == model[page], f"page {page} moved while held"
            store.release(page, dirty=write)
        elif kind == "prefetch":
            store.prefetch(chance.sample(range(num_pages), chance.randint(1, num_pages)))
        elif kind == "discard" and page not in durable and page not in held:
            store.discard([page])
            model[page] = bytes(PAGE)
        elif kind == "commit" and not any(w and p in durable for p, (_, w) in held.items()):
            store.commit(step, {"at": step})
            committed[step] = {page: model[page] for page in durable}
            if not held and chance.random() < 0.3:
                step_back, meta = store.records()[-1]
                assert meta == {"at": step_back}
                store.restore(step_back)
                model = {page: bytes(PAGE) for page in range(num_pages)} | committed[step_back]
    for page, (_, write) in held.items():
        store.release(page, dirty=write)
    for page in range(num_pages):
        assert bytes(store.hold(page).tolist()) == model[page]
        store.release(page)
    store.close()


@pytest.mark.parametrize("seed", range(4))
def test_threads_lose_no_addition(tmp_path: Path, seed: int) -> None:
    """Four threads add to random pages, holding two at times; every addition counts once, and
    what a commit took is a state between two of its thread's additions."""
    store = new_store(
        tmp_path, num_pages=16, durable=range(12), num_frames=10, store={"policy": AnyPage(seed)}
    )
    writer = [threading.Lock() for _ in range(16)]
    totals = [[0] * 16 for _ in range(4)]
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        chance = random.Random(10 * seed + thread)
        try:
            for _ in range(300):
                store.prefetch([chance.randrange(16)])
                other, page = chance.sample(range(16), 2)
                store.hold(other)
                with writer[page]:
                    store.hold(page, write=True).view(torch.int64).add_(1)
                    store.release(page, dirty=True)
                store.release(other)
                totals[thread][page] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [value_of(store, page) for page in range(16)] == [sum(t) for t in zip(*totals)]
    report = store.report()
    assert report["write_bytes"] == report["writes"] * PAGE and report["misses"] > 100
    store.close()


def test_what_fits_never_moves() -> None:
    store = in_memory()
    first = [store.hold(page).data_ptr() for page in range(4)]
    for page in range(4):
        store.release(page)
        fill(store, page, page)
    assert first == [store.hold(page).data_ptr() for page in range(4)]
    assert store.report()["reads"] == store.report()["writes"] == 0
    store.close()


def test_frames_are_page_aligned() -> None:
    store = in_memory()
    assert store.hold(3).data_ptr() % 4096 == 0
    store.release(3)
    store.close()


def test_too_few_frames_without_a_disk_are_refused() -> None:
    with pytest.raises(OutOfPages, match=r"engine.cpu_bytes=12.00 KiB: .* need 4096 bytes more"):
        store_on(
            None, num_pages=4, num_frames=3, durable=range(4), page_bytes=PAGE, policy=AnyPage()
        )


def test_all_held_prints_a_table(tmp_path: Path) -> None:
    def describe(page: int) -> str:
        return f"unit {page // 3}"

    store = new_store(tmp_path, num_frames=4, store={"describe": describe})
    for page in range(4):
        store.hold(page)
    with pytest.raises(OutOfPages) as caught:
        store.hold(7)
    first, head, row, *largest = str(caught.value).splitlines()
    assert first.startswith("engine.cpu_bytes=16.00 KiB: all 4 pages in memory are held")
    assert head.split() == ["tier", "budget", "used", "held", "needed"]
    assert row.split()[::2] == ["cpu", "KiB", "KiB", "KiB", "KiB"]
    assert row.split()[1::2] == ["16.00", "16.00", "16.00", "20.00"]
    assert [line.split()[-4:] for line in largest] == [
        ["12.00", "KiB", "unit", "0"],
        ["4.00", "KiB", "unit", "1"],
    ]
    store.release(0)
    store.hold(7)
    store.close()


def test_a_wait_for_a_frame_ends_when_another_thread_releases(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=1)
    store.hold(0)
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(value_of(store, 1)))
    thread.start()
    time.sleep(0.7)  # longer than the grace of a wait that cannot end
    assert not got
    store.release(0)
    thread.join()
    assert got == [0]
    store.close()


def test_clean_pages_leave_at_no_cost(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=2)
    for page in range(8):
        fill(store, page, page)
    for _ in range(3):
        assert [value_of(store, page) for page in range(8)] == list(range(8))
    assert store.report()["writes"] == 8  # once each, when they were dirty
    store.close()


def test_pages_never_written_are_zeros_without_reading(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=2)
    assert [value_of(store, page) for page in [*range(8), *range(8)]] == [0] * 16
    assert store.report()["reads"] == 0
    store.close()


def test_a_discarded_page_is_zeros_and_is_not_written(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_pages=8, durable=range(0), num_frames=8)
    for page in range(8):
        fill(store, page, 5)
    store.discard(range(8))
    assert [value_of(store, page) for page in range(8)] == [0] * 8
    assert store.report()["writes"] == 0
    store.close()


def test_holding_a_leaving_page_keeps_it(tmp_path: Path) -> None:
    """A page whose write is slow is wanted again: it is there at once, and is not read back."""
    writing, go_on = threading.Event(), threading.Event()
    store = new_store(tmp_path, num_frames=2, store={"policy": Lru()})
    write = store._ssd.write

    def slow(*args):
        writing.set()
        go_on.wait(10)
        return write(*args)

    store._ssd.write = slow
    fill(store, 0, 7)
    fill(store, 1, 8)
    store.prefetch([2])  # evicts 0, the least recently used
    assert writing.wait(10)
    assert int(store.hold(0)[0]) == 7
    go_on.set()
    store.release(0)
    assert value_of(store, 0) == 7 and store.report()["reads"] == 0
    store.close()


def test_prefetch_evicts_nothing_held_or_prefetched(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=3, store={"policy": Lru()})
    for page in range(8):
        fill(store, page, page)
    held = store.hold(0)
    store.prefetch([1, 2, 3, 4, 5])
    time.sleep(0.2)
    before = store.report()["reads"]
    assert int(held.view(torch.int64)[0]) == 0
    assert value_of(store, 1) == 1 and value_of(store, 2) == 2
    assert store.report()["reads"] == before
    assert store.report()["prefetches_given_up"] == 3
    store.close()


def test_a_schedule_brings_pages_before_they_are_needed(tmp_path: Path) -> None:
    """With three frames for six pages in turn, orders two ahead leave nothing to wait for."""
    pages = [0, 1, 2, 3, 4, 5]
    orders = [Fetch(i, (i + 2) % 6, i + 2 if i < 4 else i - 4, (i - 1) % 6) for i in range(6)]
    store = new_store(tmp_path, num_pages=6, num_frames=3, store={"policy": NextUse()})
    for page in pages:
        fill(store, page, page)
    store.set_schedule(TinySchedule(pages, orders))
    store.note("forward")
    for _ in range(4):
        store.begin_step()
        before = store.report()
        for page in pages:
            assert value_of(store, page) == page
            settle(store)
    after = store.report()
    assert after["misses"] == before["misses"] and after["hits"] == before["hits"] + 6
    assert after["reads"] == before["reads"] + 6
    store.close()


def test_an_order_waits_until_what_it_evicts_is_released(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=2, store={"policy": Lru()})
    for page in range(8):
        fill(store, page, page)  # 6 and 7 stay
    store.set_schedule(TinySchedule([7, 6, 3], [Fetch(0, 3, 2, 7)]))
    store.note("forward")
    store.begin_step()
    store.hold(7)
    time.sleep(0.1)
    assert store.report()["reads"] == 0  # not in the frame of 6, which is needed sooner
    store.release(7)
    time.sleep(0.1)
    assert store.report()["reads"] == 1
    misses = store.report()["misses"]
    assert value_of(store, 3) == 3 and store.report()["misses"] == misses
    store.close()


def test_a_prefetch_whose_wait_for_a_frame_is_in_vain_begins_anew(tmp_path: Path) -> None:
    """It waits for page 7 to be written, and a hold takes that page back."""
    store = new_store(tmp_path, num_frames=2, store={"policy": Lru()})
    for page in range(8):
        fill(store, page, page)  # 6 and 7 stay, dirty
    store.set_schedule(TinySchedule([7, 6, 7, 6, 3], [Fetch(0, 3, 4, 7)]))
    store.note("forward")
    store.begin_step()
    before = store.report()["reads"]
    with store._lock:
        threads, store._ssd.threads.submit = store._ssd.threads, lambda *job, urgent=False: None
    store.hold(7)
    store.release(7)  # the order of page 3 begins: 7 is to be written, by nobody
    assert list(store._pager.wants) == [3]
    del threads.submit
    with store._lock:
        store._pager.stay(7)
        assert store._pager.given_up == {3} and not store._pager.wants
        store._pager.writing.discard(7)
        store._pager.settle(7)
    store.hold(6)
    store.release(6)
    settle(store)
    assert store.report()["reads"] == before + 1 and store._pager.given_up == set()
    store.close()


def test_what_a_commit_takes_is_written_at_its_last_change(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=8, store={"policy": NextUse()})
    schedule = TinySchedule([1, 2, 1, 3, 2], [])
    schedule.flushes = [Flush(1, 2, 5), Flush(2, 4, 6)]
    store.set_schedule(schedule)
    store.note("forward")
    for step in (1, 2):
        store.begin_step()
        before, written = store.report()["writes"], []
        for page in (1, 2, 1, 3, 2):
            fill(store, page, 10 * step + page)
            settle(store)
            written.append(store.report()["writes"] - before)
        assert written == [0, 0, 1, 1, 2]
        store.commit(step, {})
        store.wait_commit()
        assert store.report()["writes"] == before + 3  # 3 alone was left
    fill(store, 1, 99)
    settle(store)
    store.undo()
    assert [value_of(store, page) for page in (1, 2, 3)] == [21, 22, 23]
    store.close()


@pytest.mark.parametrize("num_frames", [7, 10, 13])
def test_moves_are_those_of_the_schedule(tmp_path: Path, num_frames: int) -> None:
    """Steps of three units over 18 pages read and write what make_schedule says, and wait for
    nothing on a quick disk."""
    units = [
        UnitWork(
            name=f"block {i}",
            weights=[2 * i, 2 * i + 1],
            gradients=[12 + 2 * i, 13 + 2 * i],
            updates=[(6 + 2 * i, [2 * i], [12 + 2 * i]), (7 + 2 * i, [2 * i + 1], [13 + 2 * i])],
            forward_s=0.02,
            backward_s=0.02,
            update_s=0.02,
        )
        for i in range(3)
    ]
    trace = synthetic_trace(step_phases(units))
    schedule = make_schedule(
        trace, num_frames=num_frames, page_bytes=PAGE, read_bytes_per_s=1e8, write_bytes_per_s=1e8
    )
    store = new_store(tmp_path, num_pages=18, num_frames=num_frames, store={"policy": NextUse()})
    store.set_schedule(schedule)
    store.note("forward")
    values = [0] * 18
    before, moved = store.report(), []
    for _ in range(5):
        store.begin_step()
        for access in trace.accesses:
            store.note(access.what)
            data = store.hold(access.page, write=access.is_write).view(torch.int64)
            assert int(data[0]) == values[access.page]
            if access.is_write:
                values[access.page] += 1
                data.fill_(values[access.page])
            store.release(access.page, dirty=access.is_write)
            settle(store)
        after = store.report()
        moved.append(
            {key: after[key] - before[key] for key in ("read_bytes", "write_bytes", "misses")}
        )
        before = after
    expected = {"read_bytes": schedule.read_bytes, "write_bytes": schedule.written_bytes}
    assert moved[-1] == moved[-2] == {**expected, "misses": 0}
    store.close()


def settle(store) -> None:
    """Wait until nothing is on its way, as if the disk were quick."""
    with store._lock:
        pager = store._pager
        pager.changed.wait_for(lambda: not (pager.num_fetching or pager.writing), timeout=10)


def test_an_access_off_the_schedule_moves_nothing(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=8)
    store.set_schedule(TinySchedule([0, 1, 2, 3], [Fetch(1, 5, 2, None)]))
    store.note("forward")
    store.begin_step()
    value_of(store, 0)
    value_of(store, 7)
    assert store._pager.position == 0
    value_of(store, 2)  # 1 is passed by
    assert store._pager.position == 2
    value_of(store, 1)
    assert store._pager.position == 2
    store.close()


def test_the_trace_has_one_entry_a_hold(tmp_path: Path) -> None:
    store = in_memory()
    found: list[tuple] = []
    store.trace_into(lambda *access: found.append(access[:3]))
    store.note("forward 0")
    value_of(store, 1)
    fill(store, 2, 1)
    store.trace_into(None)
    value_of(store, 3)
    assert found == [(1, False, "forward 0"), (2, True, "forward 0")]
    store.close()


def test_a_failed_write_in_the_background_is_told(tmp_path: Path) -> None:
    Failing.after = 0
    ssd = SsdTier.create(tmp_path, identity(), open_file=Failing)
    store = store_on(ssd, num_frames=2)
    fill(store, 0, 1)
    fill(store, 1, 1)
    with pytest.raises(StorageError, match=r"engine.ssd_path=.*pages: .*No space left.*; free"):
        value_of(store, 2)
    with pytest.raises(StorageError, match="No space left"):
        value_of(store, 0)
    store.close()  # it was told


def test_close_tells_what_nobody_was_told(tmp_path: Path) -> None:
    Failing.after = 0
    store = store_on(SsdTier.create(tmp_path, identity(), open_file=Failing), num_frames=2)
    fill(store, 0, 1)
    store.commit(1, {})
    with pytest.raises(StorageError, match="No space left"):
        store.close()


def test_mistakes_of_the_engine_are_asserted(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=2)
    with pytest.raises(AssertionError, match="page 0 is not held"):
        store.release(0)
    store.hold(0, write=True)
    with pytest.raises(AssertionError, match="held for writing at the commit"):
        store.commit(1, {})
    store.release(0, dirty=True)
    store.hold(0)
    with pytest.raises(AssertionError, match="was not held for writing"):
        store.release(0, dirty=True)
    store.release(0)
    store.close()


def test_nothing_is_allocated_after_warm_up(tmp_path: Path) -> None:
    """Resident bytes and mappings after 4,000 moves are what they were after 400."""
    size = 64 * 1024
    store = new_store(tmp_path, num_pages=64, page_bytes=size, num_frames=16)

    def work(count: int) -> None:
        for i in range(count):
            fill(store, i * 7 % 64, i)
            if i % 100 == 99:
                store.commit(i + work.base, {})  # type: ignore[attr-defined]
        store.wait_commit()
        work.base += count  # type: ignore[attr-defined]

    work.base = 0  # type: ignore[attr-defined]
    work(400)
    gc.collect()
    before = footprint()
    work(4000)
    gc.collect()
    after = footprint()
    assert after[0] - before[0] < 2 << 20, "resident bytes grew"
    assert after[1] - before[1] <= 2, "mappings grew"
    store.close()


def footprint() -> tuple[int, int]:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return resident, len(Path("/proc/self/maps").read_text().splitlines())
