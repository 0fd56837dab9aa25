"""Kills, dead peers, failing disks: the last good checkpoint is always there and always found."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ptm.checkpoint.config import CheckpointConfig
from ptm.checkpoint.load import load, newest_good
from ptm.checkpoint.save import Saver
from ptm.checkpoint.verify import verify
from ptm.common.errors import CheckpointError, HangError, PtmError, StorageError
from ptm.mesh.peers import Peers
from tests.support import faulty_disk
from tests.support.ranks import PRELOAD, RankFailed, run_ranks
from tests.support.state import assert_bitwise_equal, empty, sharded, whole

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FORKSERVER = multiprocessing.get_context("forkserver")


def saver(root: Path, *, keep: int = 1, **options: Any) -> Saver:
    return Saver(root, CheckpointConfig(keep=keep), run_id="r", **options)


def save(saving: Saver, step: int, seed: int, *, scale: int = 1, block: bool = True) -> None:
    """The state is whole(seed), and meta says so: a mixture of two saves cannot pass for one."""
    meta = {"seed": seed, "scale": scale}
    saving.save(whole(seed, scale), step=step, meta=meta, block=block)


def check_whole(root: Path) -> tuple[int, int]:
    """What a restart finds, (step, seed), after comparing every value with what was saved."""
    good = newest_good(root, repair=True)
    assert good is not None and good.rejected == (), good
    meta = good.manifest.meta
    wanted = whole(meta["seed"], meta["scale"])
    into = empty(wanted)
    load(good, into)
    assert_bitwise_equal(into, wanted)
    left = [name for name in os.listdir(root) if not name[5:].isdigit()]
    assert left == [], "the restart has cleaned up"
    for name in os.listdir(root):
        verify(root / name)  # no half of an old one under a good name
    return good.manifest.step, meta["seed"]


# ------------------------------------------------------------------------------- kill -9 (T17)


def kill_before_change(root: str, count: int) -> None:
    """SIGKILL this process just before its count-th change of the file system under `root`."""
    left = count

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        is_change = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
            event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        )
        # rmtree works with names relative to an open folder.
        if is_change and (str(args[0]).startswith(root) or not os.path.isabs(args[0])):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save_new_then_again(root: str, count: int) -> None:
    kill_before_change(root, count)
    saving = saver(Path(root))
    save(saving, 2, seed=2)  # deletes step 1
    save(saving, 2, seed=3)  # replaces step 2
    saving.close()


def run_to_end(target: Any, *args: Any) -> int:
    FORKSERVER.set_forkserver_preload(list(PRELOAD))
    process = FORKSERVER.Process(target=target, args=args)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


@pytest.mark.slow
def test_a_kill_before_any_change_of_the_disk_loses_nothing(tmp_path: Path) -> None:
    found = []
    for count in range(1, 1000):
        root = tmp_path / str(count)
        first = saver(root)
        save(first, 1, seed=1)
        first.close()
        code = run_to_end(save_new_then_again, str(root), count)
        found.append(check_whole(root))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    # Every state in turn, never back: (1, 1) until the first rename, then (2, 2), then (2, 3).
    assert found == sorted(found) and set(found) == {(1, 1), (2, 2), (2, 3)}
    assert len(found) > 20, "the sweep has seen the whole save"


def save_for_ever(root: str, send: Connection, seed: int) -> None:
    saving, rng = saver(Path(root), keep=2), random.Random(seed)
    good = newest_good(Path(root), repair=True)
    step = good.manifest.step if good else 0
    send.send(step)
    while True:
        is_again = rng.random() < 0.3 and step > 0
        step += not is_again
        block = rng.random() < 0.5
        save(saving, step, seed=rng.randrange(10**6), scale=24, block=block)
        if block:
            send.send(step)


@pytest.mark.slow
def test_60_kills_at_random_moments_lose_nothing_that_was_saved(tmp_path: Path) -> None:
    FORKSERVER.set_forkserver_preload(list(PRELOAD))
    rng, acknowledged, steps = random.Random(17), 0, []
    for kill in range(60):
        receive, send = FORKSERVER.Pipe(duplex=False)
        process = FORKSERVER.Process(target=save_for_ever, args=(str(tmp_path), send, kill))
        process.start()
        send.close()
        assert receive.poll(60)
        time.sleep(rng.uniform(0.0, 0.5))
        process.kill()
        process.join()
        while True:
            try:
                acknowledged = max(acknowledged, receive.recv())
            except EOFError:
                break
        step = check_whole(tmp_path)[0] if any(tmp_path.glob("step-*[0-9]")) else 0
        assert step >= acknowledged, f"kill {kill}: step {acknowledged} was saved, found {step}"
        steps.append(step)
    assert steps == sorted(steps) and steps[-1] > 60


# --------------------------------------------------------------------------- dead and late peers


def peer_job(rank: int, world: int, root: str, fault: str, victim: int) -> None:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=3))

    delays_s = [4.0] if rank == victim else []

    def on_write(path: str, data: bytes) -> None:
        if delays_s and fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if delays_s:
            time.sleep(delays_s.pop())

    saving = saver(Path(root), peers=Peers(group), writer=faulty_disk.writer_on(on_write))
    started = time.monotonic()
    with pytest.raises(HangError, match="a rank has left or is late"):
        saving.save(sharded(whole(2)), step=2, meta={}, block=True)
    assert time.monotonic() - started < 15
    saving.close()
    (Path(root).parent / f"told-{rank}").touch()


@pytest.mark.parametrize("victim", [0, 1], ids=["rank0", "rank1"])
@pytest.mark.parametrize("fault", ["dies", "is-late"])
def test_a_peer_that_is_gone_or_late_is_an_error_and_no_hang(
    tmp_path: Path, fault: str, victim: int
) -> None:
    root = tmp_path / "c"
    first = saver(root)
    save(first, 1, seed=1)
    first.close()
    if fault == "dies":
        with pytest.raises(RankFailed, match=rf"rank {victim} of 2: died with exit code -9"):
            run_ranks(2, peer_job, str(root), fault, victim, timeout_s=40)
    else:
        run_ranks(2, peer_job, str(root), fault, victim, timeout_s=40)
    told = {path.name for path in tmp_path.glob("told-*")}
    assert told == {"told-0", "told-1"} - ({f"told-{victim}"} if fault == "dies" else set())
    assert check_whole(root) == (1, 1)


# ------------------------------------------------------------------------------ the disk (T20)


def disk_job(rank: int, world: int, root: str, code: int) -> str:
    """One rank's disk fails once; all ranks hear of it, the run goes on and saves later."""
    peers = Peers(dist.new_group(backend="gloo"))
    is_broken = [True]

    def on_write(path: str, data: bytes) -> None:
        if rank == 1 and is_broken[0]:
            raise OSError(code, os.strerror(code), path)

    saving = saver(Path(root), peers=peers, writer=faulty_disk.writer_on(on_write))
    saving.save(sharded(whole(2)), step=2, meta={})  # in the background: nothing is raised here
    with pytest.raises(StorageError, match=os.strerror(code)) as caught:
        saving.save(sharded(whole(3)), step=3, meta={})
    assert caught.value.exit_code == 74
    dist.barrier()
    assert os.listdir(root) == ["step-00000001"], "no temporary folder is left"
    dist.barrier()
    is_broken[0] = False
    meta = {"seed": 4, "scale": 1}
    assert saving.save(sharded(whole(4)), step=4, meta=meta, block=True) is not None
    saving.close()
    return str(caught.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_failing_disk_on_one_rank_is_told_by_all(tmp_path: Path, code: int) -> None:
    root = tmp_path / "c"
    first = saver(root)
    save(first, 1, seed=1)
    first.close()
    messages = run_ranks(2, disk_job, str(root), code)
    assert messages[0] == messages[1] and "\n" not in messages[0]
    assert check_whole(root) == (4, 4)


def limit_job(root: str) -> None:
    saving = saver(Path(root))
    save(saving, 1, seed=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 1500, 2500):  # within attachments' absence: header, tensors, manifest
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(StorageError, match=r"\(File too large\); .*ulimit -f"):
            save(saving, 2, seed=2)
        assert os.listdir(root) == ["step-00000001"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    save(saving, 2, seed=2)
    saving.close()


def test_a_limit_on_file_sizes_leaves_the_last_good_one(tmp_path: Path) -> None:
    assert run_to_end(limit_job, str(tmp_path)) == 0
    assert check_whole(tmp_path) == (2, 2)


NO_MOUNT = 77


def full_disk_job(disk: str) -> None:
    """A file system of 300 KiB, which something else fills while a checkpoint is written."""
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, ms_rec, ms_private = 0x00020000, 0x4000, 1 << 18
    is_mounted = (
        libc.unshare(clone_newns) == 0
        and libc.mount(b"none", b"/", None, ms_rec | ms_private, None) == 0
        and libc.mount(b"none", disk.encode(), b"tmpfs", 0, b"size=300k") == 0
    )
    if not is_mounted:
        os._exit(NO_MOUNT)
    root, ballast = Path(disk) / "checkpoints", Path(disk) / "ballast"

    def fill(path: str, data: bytes) -> None:
        with open(ballast, "wb", buffering=0) as file:
            while True:
                try:
                    file.write(b"x" * 512)
                except OSError:
                    return

    saving = saver(root)
    save(saving, 1, seed=1)
    with pytest.raises(StorageError, match=r"\(No space left on device\); free space"):
        save(saver(root, writer=faulty_disk.writer_on(fill)), 2, seed=2)
    with pytest.raises(StorageError, match=r"free=.*: a checkpoint needs"):
        save(saving, 2, seed=2)
    assert check_whole(root) == (1, 1)
    ballast.unlink()
    save(saving, 2, seed=2)
    assert check_whole(root) == (2, 2)
    saving.close()


def test_a_disk_that_fills_up_leaves_the_last_good_one(tmp_path: Path) -> None:
    code = run_to_end(full_disk_job, str(tmp_path))
    if code == NO_MOUNT:
        pytest.skip("mounting a small file system needs root")
    assert code == 0


def test_a_disk_that_cannot_read_makes_the_one_before_the_newest_good(tmp_path, monkeypatch):
    saving = saver(tmp_path, keep=2)
    save(saving, 1, seed=1)
    save(saving, 2, seed=2)
    broken = {p.stat().st_ino for p in (tmp_path / "step-00000002").glob("*.safetensors")}
    preadv = os.preadv

    def failing(descriptor: int, *args: Any) -> int:
        if os.fstat(descriptor).st_ino in broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, *args)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match="Input/output error: cannot be read"):
        verify(tmp_path / "step-00000002")
    good = newest_good(tmp_path)
    assert good is not None and good.manifest.step == 1


def test_an_error_in_the_background_is_raised_once(tmp_path: Path) -> None:
    saving = saver(tmp_path, writer=faulty_disk.failing(errno.EIO))
    save(saving, 1, seed=1, block=False)
    with pytest.raises(PtmError, match="Input/output error"):
        saving.wait()
    assert saving.wait() is None
    saving.close()
    assert os.listdir(tmp_path) == []
