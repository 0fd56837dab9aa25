"""The page file and its preflight: what is refused before a run, and what the disk is asked for."""

import errno
import mmap
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ptm.common.errors import PlanError, StorageError
from ptm.engine.disk import File, file_system
from ptm.engine.tier import Frames, IoThreads, SsdTier, probe
from tests.support.pages import PAGE, Failing, fill, identity, new_store, store_on, value_of

SHM = Path("/dev/shm")


def test_a_folder_in_memory_is_refused() -> None:
    if not SHM.is_dir() or file_system(SHM) != "tmpfs":
        pytest.skip("/dev/shm is not a tmpfs here")
    match = r"^engine.ssd_path=/dev/shm/x: is memory \(tmpfs\), not a disk; name a folder on a disk"
    with pytest.raises(StorageError, match=match):
        SsdTier.create(SHM / "x", identity())
    assert not (SHM / "x").exists()


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StorageError, match="is not writable; name a writable folder"):
        SsdTier.create(tmp_path / "pages", identity())
    tmp_path.chmod(0o700)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file; name a folder"):
        SsdTier.create(tmp_path / "file", identity())


def test_pages_that_do_not_fit_on_the_disk_are_refused(tmp_path: Path) -> None:
    match = r"64.00 TiB of pages do not fit into the .* that are free; free space"
    with pytest.raises(StorageError, match=match):
        SsdTier.create(tmp_path, identity(num_pages=2**32, page_bytes=8192))
    assert not list(tmp_path.iterdir())


def test_a_budget_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"engine.ssd_bytes=60.00 KiB: .* rank 0 need 64.00 KiB"):
        SsdTier.create(tmp_path, identity(), budget_bytes=60 * 1024)


def test_a_limit_on_file_sizes_is_said_in_one_line(tmp_path: Path) -> None:
    code = (
        "import resource; from ptm.engine.tier import SsdTier\n"
        "from tests.support.pages import identity\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40960, 40960))\n"
        f"SsdTier.create({str(tmp_path)!r}, identity())\n"
    )
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    last = ended.stderr.strip().splitlines()[-1]
    assert "rank-00000.pages: cannot be allocated (File too large); raise the limit" in last
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 40960


def test_a_second_run_on_one_folder_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path, num_frames=2)
    match = rf"/run: is in use by process {os.getpid()} on .*; stop that run"
    with pytest.raises(StorageError, match=match):
        SsdTier.create(tmp_path, identity(), replace=True)
    fill(store, 0, 1)
    store.commit(1, {})
    store.wait_commit()
    with pytest.raises(StorageError, match=match):
        SsdTier.open_existing(tmp_path, identity())
    other = new_store(tmp_path, num_frames=2, rank=1, world=2)  # another rank may
    other.close()
    store.close()
    SsdTier.open_existing(tmp_path, identity()).close()


def test_the_file_is_allocated_whole(tmp_path: Path) -> None:
    ssd = SsdTier.create(tmp_path, identity(num_pages=100, durable=range(60)))
    found = ssd.path.stat()
    assert (found.st_size, found.st_blocks * 512) == (160 * PAGE, 160 * PAGE)
    ssd.close()


@pytest.mark.parametrize("frozen", [range(0), range(5, 7), range(4, 6), range(3, 7)])
def test_slots_share_no_byte(frozen: range) -> None:
    it = identity(
        num_pages=9, durable=range(3, 7), frozen_start=frozen.start, frozen_stop=frozen.stop
    )
    two = set(it.durable) - set(frozen)
    slots = [(page, slot) for page in range(9) for slot in range(2 if page in two else 1)]
    offsets = sorted(it.offset(page, slot) for page, slot in slots)
    assert offsets == list(range(0, it.file_bytes, PAGE))


def test_a_file_system_without_direct_io_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def without(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", without)
    ssd = SsdTier.create(tmp_path, identity())
    assert not ssd.is_direct and "has no O_DIRECT" in ssd.note
    store = store_on(ssd, num_frames=2)
    for page in range(8):
        fill(store, page, page)
    assert [value_of(store, page) for page in range(8)] == list(range(8))
    store.close()


def test_short_reads_and_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may take less than it is given; what is missing at the end of a file is an error."""
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda f, data, at: pwritev(f, [data[0][:700]], at))
    monkeypatch.setattr(os, "preadv", lambda f, into, at: preadv(f, [into[0][:900]], at))
    file = File(tmp_path / "file")
    data = os.urandom(PAGE)
    file.write(100, memoryview(data))
    into = bytearray(PAGE)
    file.read(100, memoryview(into))
    assert into == data
    with pytest.raises(OSError, match="ends at byte 4196"):
        file.read(101, memoryview(into))
    file.close()


def test_reads_and_writes_are_counted(tmp_path: Path) -> None:
    ssd = SsdTier.create(tmp_path, identity())
    view = memoryview(mmap.mmap(-1, PAGE))
    view[:4] = b"page"
    digest = ssd.write(3, 1, view)
    view[:4] = b"gone"
    ssd.read(3, 1, view, digest)
    assert view[:4] == b"page"
    assert (ssd.writes.count, ssd.writes.num_bytes) == (ssd.reads.count, ssd.reads.num_bytes)
    assert ssd.reads.num_bytes == PAGE and ssd.reads.seconds > 0 and ssd.writes.seconds > 0
    ssd.close()


def test_a_failing_read_names_the_file(tmp_path: Path) -> None:
    ssd = SsdTier.create(tmp_path, identity(), open_file=Failing)
    os.truncate(ssd.path, 0)
    with pytest.raises(StorageError, match=r"rank-00000.pages: cannot be read \(ends at byte 0\)"):
        ssd.read(0, 0, memoryview(mmap.mmap(-1, PAGE)), None)
    ssd.close()


def test_urgent_jobs_go_first() -> None:
    threads, order = IoThreads(1, "test"), []
    gate = threading.Event()
    threads.submit(gate.wait)
    for name in "abc":
        threads.submit(order.append, name)
    threads.submit(order.append, "urgent", urgent=True)
    gate.set()
    threads.close()
    assert order == ["urgent", "a", "b", "c"]


def test_frames_show_one_memory_twice() -> None:
    frames = Frames(3, PAGE, pin=False)
    frames.tensors[1].fill_(7)
    assert bytes(frames.views[1]) == bytes([7]) * PAGE and not any(frames.views[2])
    frames.close()


def test_the_probe_measures_and_leaves_nothing(tmp_path: Path) -> None:
    found = probe(tmp_path, 64 * 1024, 0.2)
    assert found.read_bytes_per_s > 1e6 and found.write_bytes_per_s > 1e6
    assert min(probe(tmp_path, 64 * 1024, 0.0)) > 0  # no time at all, on a busy machine
    assert not list(tmp_path.iterdir())
