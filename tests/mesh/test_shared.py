"""Collectives in shared memory against the same ones over gloo, bit for bit, and what the ranks say
when one of them is gone."""

import functools
import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from ptm.common.errors import HangError, RecipeError
from ptm.kernels.shm import make_port
from ptm.mesh.collectives import all_to_all, gather, scatter_sum
from ptm.mesh.mesh import Mesh, share_groups
from ptm.mesh.shared import port_of
from tests.support.mesh import mesh_of_test
from tests.support.native import needs_library
from tests.support.ranks import RankFailed, run_ranks

pytestmark = needs_library
TIMEOUT_S = 30.0


def _cuts(numel: int, world: int, seed: int) -> list[int]:
    """Ranges of any length, none among them."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, numel + 1, (world - 1,), generator=generator).sort().values.tolist()
    return [0, *inner, numel]


def _results(mesh: Mesh, numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What this rank has after one of each, all started before the first is waited for."""
    group, rank, world = mesh.dp.get_group(), mesh.rank, mesh.world
    generator = torch.Generator().manual_seed(100 * numel + rank)
    full = torch.randn(numel, generator=generator).to(dtype)
    cuts = _cuts(numel, world, seed=numel)
    gathered = torch.zeros(numel, dtype=dtype)
    mine = slice(cuts[rank], cuts[rank + 1])
    gathered[mine] = full[mine]
    total = torch.ones(mine.stop - mine.start)
    sent = [(5 * rank + 3 * other + numel) % 4 * (numel // 16) for other in range(world)]
    received = [(5 * other + 3 * rank + numel) % 4 * (numel // 16) for other in range(world)]
    rows = torch.randn(sum(sent), 3, generator=generator).to(dtype)
    out, rows_come = all_to_all(rows, sent, received, group, mesh.ledger)
    whole = gather(gathered, cuts, group, mesh.ledger)
    summed = scatter_sum(full, cuts, group, mesh.ledger)
    summed.add_to(total)
    whole.wait()
    rows_come.wait()
    return [out, gathered, total]


def _both_ways(rank: int, world: int, room: int) -> None:
    mesh = mesh_of_test(rank, world)
    sizes, kinds = [0, 1, 7, 37, 4096, 50_001], [torch.float32, torch.bfloat16]
    cases = [(numel, dtype) for numel in sizes for dtype in kinds]
    wanted = [_results(mesh, *case) for case in cases]
    bytes_of_gloo = {name: entry.sent_bytes for name, entry in mesh.ledger.entries.items()}
    mesh.ledger.entries.clear()
    share_groups(mesh, functools.partial(make_port, room=room), TIMEOUT_S)
    assert (port_of(mesh.dp.get_group()) is not None) == (world > 1)
    for case, expected in zip(cases, wanted):
        for found, of_gloo in zip(_results(mesh, *case), expected, strict=True):
            assert torch.equal(found, of_gloo), case
    assert {n: entry.sent_bytes for n, entry in mesh.ledger.entries.items()} == bytes_of_gloo
    mesh.close()


@pytest.mark.parametrize("room", [4096, 4 * 2**20], ids=["one page", "four MiB"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_memory_and_gloo_give_the_same_bits_and_count_the_same_bytes(world, room):
    run_ranks(world, _both_ways, room)


def _axes(rank: int, world: int) -> list[float]:
    mesh = mesh_of_test(rank, world, ep=2)
    share_groups(mesh, make_port, TIMEOUT_S)
    found = []
    for axis in (mesh.dp, mesh.ep, mesh.edp):
        full = torch.full((axis.size(),), float(rank))
        gather(full, list(range(axis.size() + 1)), axis.get_group(), mesh.ledger).wait()
        found.append(full.tolist())
    mesh.close()
    return found


def test_every_axis_has_a_port_of_its_own():
    found = run_ranks(4, _axes)
    pairs = [[0, 1], [0, 1], [2, 3], [2, 3]]
    apart = [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert found == [[[0, 1, 2, 3], a, b] for a, b in zip(pairs, apart)]


def _one_cannot(rank: int, world: int) -> None:
    mesh = mesh_of_test(rank, world)
    share_groups(mesh, lambda *args: None if rank == 1 else make_port(*args), TIMEOUT_S)
    assert mesh.transport == "gloo"
    assert _results(mesh, 37, torch.float32)


def test_where_one_rank_cannot_all_stay_with_gloo():
    run_ranks(2, _one_cannot)


def test_without_memory_to_share_there_is_no_port():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        assert make_port(0, 2, TIMEOUT_S) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_another_transport_is_refused(monkeypatch):
    monkeypatch.setenv("PTM_COLLECTIVES", "carrier_pigeon")
    with pytest.raises(RecipeError, match="PTM_COLLECTIVES=carrier_pigeon: is one of memory, gloo"):
        make_port(0, 2, 1.0)


def _names_the_lost(rank: int, world: int, how: str, folder: Path) -> None:
    mesh = mesh_of_test(rank, world)
    group = mesh.dp.get_group()
    share_groups(mesh, make_port, 3.0)
    full = torch.zeros(3 * 10**6)
    cuts = [0, 10**6, 2 * 10**6, 3 * 10**6]
    gather(full, cuts, group, mesh.ledger).wait()
    if rank == 1:
        (folder / "pid").write_text(str(os.getpid()))
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "left":
            mesh.close()
        time.sleep(6 if how == "silent" else 1)
        return
    started = time.monotonic()
    with pytest.raises(HangError) as caught:
        for _ in range(3):  # one too many to be held by the rings
            gather(full, cuts, group, mesh.ledger).wait()
    took = time.monotonic() - started
    (folder / f"heard-{rank}").write_text(f"{took:.3f} {caught.value}")
    mesh.close()


def _shared_files() -> set[str]:
    return {p.name for p in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()


@pytest.mark.parametrize(
    "how, words, most_s",
    [
        ("killed", r"rank 1 \(pid {pid}\) has left: ", 2.0),
        ("left", r"rank 1 \(pid {pid}\) has left: ", 2.0),
        ("silent", r"rank 1 \(pid {pid}\) has not answered for 3 s: ", 5.0),
    ],
)
def test_the_others_name_a_rank_that_is_gone_or_silent(how, words, most_s, tmp_path):
    before = _shared_files()
    if how == "killed":
        with pytest.raises(RankFailed, match="rank 1 of 3: died with exit code -9"):
            run_ranks(3, _names_the_lost, how, tmp_path)
    else:
        run_ranks(3, _names_the_lost, how, tmp_path)
    pid = (tmp_path / "pid").read_text()
    for rank in (0, 2):
        took, _, text = (tmp_path / f"heard-{rank}").read_text().partition(" ")
        assert float(took) < most_s
        assert re.match("ranks=" + words.format(pid=pid), text) and "\n" not in text, text
    assert _shared_files() <= before  # a group's files of torch's own may have gone
