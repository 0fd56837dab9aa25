"""Experts on other ranks against all experts in one process: rows, gradients, bytes, and that
nobody waits for a rank without tokens."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptm.common.errors import RecipeError
from ptm.kernels import router as router_kernel
from ptm.mesh.collectives import all_reduce_sum
from ptm.mesh.mesh import Mesh
from ptm.model.config import ModelConfig
from ptm.model.dispatch import Dispatcher, LocalDispatcher
from ptm.model.experts import Experts
from ptm.model.router import Routing
from ptm.parallel.expert import (
    AllToAllDispatcher,
    ChunkedDispatcher,
    check_experts,
    dispatcher_for,
    local_experts,
)
from ptm.parallel.recompute import recompute_blocks
from tests.support.allocator import count_bytes
from tests.support.compare import distance, random
from tests.support.mesh import mesh_of_test
from tests.support.ranks import run_ranks
from tests.support.tiny import Batch, documents, packed, tiny_model

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
    y = dispatcher.run(x, Routing(ids, weights, counts, weights), experts)
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
            if ep == world and not torch.equal(a, b):  # else edp adds up in another order
                wrong.append(f"{case}: {what} has other bits than one process")
    return wrong


@pytest.mark.parametrize("world, ep", LAYOUTS)
def test_rows_and_gradients_are_those_of_one_process(world, ep):
    assert run_ranks(world, compare_all, ep) == [[]] * world


def batch_of(rank: int) -> Batch:
    """Ranks 1 and 3 have no rows at all."""
    if rank % 2:
        ids = torch.zeros(0, 16, dtype=torch.int64)
        return Batch(ids, ids, ids.bool(), ids, ids)
    return packed([documents(24, 17, seed=rank)])


def whole_model():
    return tiny_model(dtype=torch.float64, router_aux_loss_coef=0.1).train()


def gradients(model, batch: Batch) -> list[Tensor]:
    loss = model.loss(batch)
    grads = torch.autograd.grad(loss.total, list(model.parameters()))
    return [loss.nll_sum.detach(), *grads]


def train_a_model(rank: int, world: int) -> list[str]:
    mesh = mesh_of_test(rank, world, ep=2)
    mine = local_experts(mesh, 32)
    parts = [gradients(whole_model(), batch_of(r)) for r in range(world)]
    wanted = [sum(columns) for columns in zip(*parts)]
    names = ["nll_sum", *(name for name, _ in whole_model().named_parameters())]
    wrong, first = [], None
    for chunks, recompute, noise in [(1, 0, 0), (1, 1, 0), (2, 0, 0), (3, 1, 0), (1, 1, 1)]:
        model = whole_model()
        for block in model.model.layers:
            block.mlp.dispatcher = dispatcher_for(mesh, 32, chunks)
            for name, whole in list(block.mlp.experts.named_parameters()):
                part = torch.nn.Parameter(whole.detach()[mine].clone())
                setattr(block.mlp.experts, name, part)
        if recompute:
            recompute_blocks(model.model.layers)
        mesh.ledger.entries.clear()
        with noisy_scores() if noise else contextlib.nullcontext():
            found = gradients(model, batch_of(rank))
        passes = 2 + recompute
        calls = {name: entry.calls for name, entry in mesh.ledger.entries.items()}
        if calls != {"all_to_all_counts": 2 * (1 + recompute), "all_to_all": 4 * passes * chunks}:
            wrong.append(f"{chunks} chunks, recompute {recompute}: {calls}")
        if noise:
            continue
        first = first or found
        if not all(map(torch.equal, first, found)):
            wrong.append(f"{chunks} chunks, recompute {recompute}: other bits")
    for name, a, b in zip(names, first, wanted, strict=True):
        axis = mesh.edp if ".experts." in name else mesh.dp
        all_reduce_sum(a, axis.get_group(), mesh.ledger)
        b = b[mine] if ".experts." in name else b
        if not distance(a, b) <= 1e-10:
            wrong.append(f"{name} is {distance(a, b):.1e} off")
    return wrong


@contextlib.contextmanager
def noisy_scores():
    """Scores that are others each time, as the arithmetic of a second forward may make them."""
    kept, generator = router_kernel._scores, torch.Generator().manual_seed(0)

    def noisy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kept(q, k, v) + torch.randn(q.shape, generator=generator, dtype=q.dtype)

    router_kernel._scores = noisy
    yield
    router_kernel._scores = kept


@pytest.mark.parametrize("world", [2, 4])
def test_a_model_trains_with_ranks_without_rows_recomputed_or_in_pieces(world):
    assert run_ranks(world, train_a_model) == [[]] * world


def weigh(rank: int, world: int, chunks: int) -> tuple[int, int]:
    """Most bytes held in a forward and backward, and those of the local weights."""
    mesh = mesh_of_test(rank, world, ep=2)
    config = ModelConfig(
        num_experts=16, hidden_size=64, moe_intermediate_size=128, num_attention_heads=1
    )
    experts = Experts(config)
    for name in ("w1", "w2"):
        part = random(*getattr(experts, name)[:8].shape, grad=False)
        setattr(experts, name, torch.nn.Parameter(part))
    x, weights = random(4, 64, seed=rank), random(4, 2, seed=1)
    ids = torch.tensor([[0, 9], [3, 12], [5, 14], [7, 15]])
    routing = Routing(ids, weights, torch.bincount(ids.flatten(), minlength=16), weights)
    dispatcher = dispatcher_for(mesh, 16, chunks)
    with count_bytes() as held:
        y = dispatcher.run(x, routing, experts)
        torch.autograd.grad(y.sum(), [x, experts.w1, experts.w2])
    return held.most_bytes, sum(p.nbytes for p in experts.parameters())


def test_pieces_make_no_gradients_of_the_whole_stack():
    whole, in_pieces = (run_ranks(2, weigh, chunks)[0] for chunks in (1, 8))
    weights_bytes = whole[1]
    assert weights_bytes < whole[0] < 1.5 * weights_bytes
    assert in_pieces[0] < 1.05 * whole[0]


def choose(rank: int, world: int, ep: int) -> list[tuple[str, int]]:
    mesh = mesh_of_test(rank, world, ep)
    found = [dispatcher_for(mesh, E, chunks) for chunks in (1, 3, 64)]
    return [(type(d).__name__, len(d.wire.ranges) if hasattr(d, "wire") else 0) for d in found]


def test_which_dispatcher():
    pieces = [("ChunkedDispatcher", 3), ("ChunkedDispatcher", 4)]  # at most one a local expert
    assert run_ranks(2, choose, 2)[0] == [("AllToAllDispatcher", 1), *pieces]
    assert run_ranks(2, choose, 1)[0] == [("LocalDispatcher", 0)] * 3


def test_ep_must_divide_the_experts():
    with pytest.raises(RecipeError, match=r"engine.ep=3: must divide .*num_experts=8; .*1, 2, 4"):
        check_experts(3, 8)
