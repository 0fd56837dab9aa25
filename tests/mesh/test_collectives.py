"""The collectives against sums and copies written out, ragged ranges included, and the ledger
against arithmetic."""

import itertools

import pytest
import torch

from ptm.common.errors import RecipeError
from ptm.mesh.collectives import all_to_all, gather, scatter_sum
from ptm.mesh.mesh import check_ep
from tests.support.mesh import mesh_of_test
from tests.support.ranks import run_ranks

CUTS = {1: [0, 37], 2: [0, 20, 37], 3: [0, 12, 12, 37], 4: [0, 10, 11, 30, 37]}


def _whole(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(37, generator=torch.Generator().manual_seed(rank)).to(dtype)


def _gather_and_sum(rank: int, world: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    mesh, cuts = mesh_of_test(rank, world), CUTS[world]
    group = mesh.dp.get_group()
    mine = slice(cuts[rank], cuts[rank + 1])

    full = torch.full((37,), torch.nan, dtype=dtype)
    full[mine] = _whole(9, dtype)[mine]
    gather(full, cuts, group, mesh.ledger).wait()
    assert torch.equal(full, _whole(9, dtype))

    buffer = torch.empty(world * 37, dtype=dtype)
    total = torch.ones(mine.stop - mine.start)
    scatter_sum(_whole(rank, dtype), cuts, group, mesh.ledger, buffer=buffer).add_to(total)
    wanted = torch.ones(mine.stop - mine.start)
    for other in range(world):
        wanted += _whole(other, dtype)[mine]
    assert torch.equal(total, wanted)
    return {k: (e.sent_bytes, e.bound_bytes) for k, e in mesh.ledger.entries.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gather_and_scatter_sum_are_the_copies_and_sums_written_out(world, dtype):
    entries = run_ranks(world, _gather_and_sum, dtype)
    if world == 1:
        assert entries == [{}]
        return
    for name in ("gather", "scatter_sum"):
        sent = sum(entry[name][0] for entry in entries)
        assert sent == (world - 1) * 37 * dtype.itemsize
        assert all(entry[name][0] == entry[name][1] for entry in entries)


def _exchange(rank: int, world: int) -> None:
    mesh = mesh_of_test(rank, world)
    sent = [(rank + 2 * other) % 3 for other in range(world)]
    received = [(other + 2 * rank) % 3 for other in range(world)]
    rows = torch.cat([torch.full((n, 2), 10.0 * rank + i) for i, n in enumerate(sent)])
    out, pending = all_to_all(rows, sent, received, mesh.dp.get_group(), mesh.ledger)
    pending.wait()
    wanted = torch.cat([torch.full((n, 2), 10.0 * i + rank) for i, n in enumerate(received)])
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_to_all_moves_uneven_rows(world):
    run_ranks(world, _exchange)


def _axes(rank: int, world: int, ep: int) -> tuple[list[int], list[int]]:
    mesh = mesh_of_test(rank, world, ep)
    mesh.sum_counts(torch.zeros(1))  # nobody leaves while others still connect
    return mesh.ep.mesh.flatten().tolist(), mesh.edp.mesh.flatten().tolist()


@pytest.mark.parametrize(
    "world, ep", [(w, e) for w, e in itertools.product([1, 2, 4], [1, 2, 4]) if w % e == 0]
)
def test_neighbours_share_experts_and_replicas_lie_apart(world, ep):
    for rank, (shares, replicas) in enumerate(run_ranks(world, _axes, ep)):
        assert shares == [rank // ep * ep + i for i in range(ep)]
        assert replicas == list(range(rank % ep, world, ep))


def test_ep_must_divide_the_ranks():
    with pytest.raises(RecipeError, match=r"engine.ep=3: must divide the 4 ranks; .*1, 2, 4"):
        check_ep(3, 4)
