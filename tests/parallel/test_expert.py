"""Experts on other ranks against all experts in one process: rows, gradients, bytes, and that
nobody waits for a rank without tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptm.mesh.collectives import all_reduce_sum
from ptm.mesh.mesh import Mesh
from ptm.model.config import ModelConfig
from ptm.model.dispatch import Dispatcher, LocalDispatcher
from ptm.model.experts import Experts
from ptm.model.router import Routing
from ptm.parallel.expert import (
    AllToAllDispatcher,
    ChunkedDispatcher,
    local_experts,
)
from tests.support.compare import distance, random
from tests.support.mesh import mesh_of_test
from tests.support.ranks import run_ranks

E, D, F, A = 8, 6, 5, 2
CONFIG = ModelConfig(num_experts=E, hidden_size=D, moe_intermediate_size=F, num_attention_heads=1)
LAYOUTS = [(1, 1), (2, 2), (4, 2), (4, 4)]


def any_two(rank: int, num_tokens: int) -> Tensor:
    scores = torch.rand(num_tokens, E, generator=torch.Generator().manual_seed(rank))
    return scores.argsort(1)[:, :A]


def only(*experts: int) -> Callable[[int, int], Tensor]:
    return lambda rank, num_tokens: torch.tensor(experts).expand(num_tokens, -1)


# Tokens of each rank, and where they go.
CASES: dict[str, tuple[list[int], Callable[[int, int], Tensor]]] = {
    "odd numbers": ([7, 13, 1, 5], any_two),
    "many": ([65, 40, 33, 50], any_two),
    "a rank without tokens": ([0, 9, 3, 1], any_two),
    "no tokens at all": ([0, 0, 0, 0], any_two),
    "all to one expert": ([5, 3, 4, 2], only(E - 1)),
    "all to the first rank": ([5, 0, 4, 21], only(0, 1)),
    "idle experts": ([7, 3, 1, 2], only(6, 0)),
}


def tokens_of(case: str, rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, D), ids (T, A) and weights (T, A) of one rank, the same whoever asks."""
    sizes, choose = CASES[case]
    ids = choose(rank, sizes[rank])
    x = random(sizes[rank], D, dtype=torch.float64, seed=10 * rank)
    return x, ids, random(*ids.shape, dtype=torch.float64, seed=10 * rank + 1)


def grad_of(case: str, rank: int) -> Tensor:
    size = CASES[case][0][rank]
    return random(size, D, dtype=torch.float64, seed=10 * rank + 2, grad=False)


def experts_of(mine: slice) -> Experts:
    experts = Experts(CONFIG)
    for seed, name in enumerate(("w1", "w2")):
        whole = random(*getattr(experts, name).shape, dtype=torch.float64, seed=seed, grad=False)
        setattr(experts, name, torch.nn.Parameter(whole[mine].clone()))
    return experts


def mixed(
    dispatcher: Dispatcher, experts: Experts, tokens: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> list[Tensor]:
    """y and the gradients of x, the router's weights, w1 and w2."""
    x, ids, weights = tokens
    counts = torch.bincount(ids.flatten(), minlength=E)
    y = dispatcher.run(x, Routing(ids, weights, counts), experts)
    wanted = torch.autograd.grad(y, [x, weights, experts.w1, experts.w2], grad)
    return [y.detach(), *wanted]


def oracle(case: str, rank: int, world: int, mine: slice) -> list[Tensor]:
    """What `mixed` must give on this rank, from the tokens of all in one process."""
    parts = [tokens_of(case, r, world) for r in range(world)]
    tokens = [
        torch.cat(columns).detach().requires_grad_(i != 1) for i, columns in enumerate(zip(*parts))
    ]
    grad = torch.cat([grad_of(case, r) for r in range(world)])
    y, by_x, by_weights, by_w1, by_w2 = mixed(
        LocalDispatcher(), experts_of(slice(0, E)), tuple(tokens), grad
    )
    sizes = [len(part[0]) for part in parts]
    rows = [whole.split(sizes)[rank] for whole in (y, by_x, by_weights)]
    return [*rows, by_w1[mine], by_w2[mine]]


def rows_to_others(case: str, mesh: Mesh) -> tuple[int, int]:
    """Rows that this rank sends to, and gets from, other ranks of its ep axis."""
    ep, me = mesh.ep.size(), mesh.ep.get_local_rank()
    first = mesh.rank - me
    sent_NN = [
        torch.bincount(
            tokens_of(case, first + r, mesh.world)[1].flatten() // (E // ep), minlength=ep
        )
        for r in range(ep)
    ]
    sent = sum(int(n) for to, n in enumerate(sent_NN[me]) if to != me)
    received = sum(int(row[me]) for r, row in enumerate(sent_NN) if r != me)
    return sent, received


def compare_all(rank: int, world: int, ep: int) -> list[str]:
    mesh = mesh_of_test(rank, world, ep)
    mine = local_experts(mesh, E)
    dispatchers = [
        AllToAllDispatcher(mesh, E),
        *(ChunkedDispatcher(mesh, E, chunks) for chunks in (1, 2, 3, 4) if chunks <= E // ep),
    ]
    wrong = []
    for case in CASES:
        wanted = oracle(case, rank, world, mine)
        first = None
        for dispatcher in dispatchers:
            entry = mesh.ledger.entries.get("all_to_all")
            before = entry.sent_bytes if entry else 0
            tokens, grad = tokens_of(case, rank, world), grad_of(case, rank)
            found = mixed(dispatcher, experts_of(mine), tokens, grad)
            first = first or found
            name = f"{case}, {dispatcher.__class__.__name__}"
            if not all(map(torch.equal, first, found)):
                wrong.append(f"{name}: other bits than unchunked")
            if ep > 1:  # there and back, rows and gradients
                moved = mesh.ledger.entries["all_to_all"].sent_bytes - before
                if moved != 2 * sum(rows_to_others(case, mesh)) * D * 8:
                    wrong.append(f"{name}: {moved} bytes")
        assert first is not None
        for grad in first[3:]:
            all_reduce_sum(grad, mesh.edp.get_group(), mesh.ledger)
        for what, a, b in zip(("y", "x", "weights", "w1", "w2"), first, wanted):
            if not distance(a, b) <= 1e-10:
                wrong.append(f"{case}: {what} is {distance(a, b):.1e} off")
            if ep == 1 and world == 1 and not torch.equal(a, b):
                wrong.append(f"{case}: {what} has other bits than LocalDispatcher's")
    return wrong


@pytest.mark.parametrize("world, ep", LAYOUTS)
def test_rows_and_gradients_are_those_of_one_process(world, ep):
    assert run_ranks(world, compare_all, ep) == [[]] * world
