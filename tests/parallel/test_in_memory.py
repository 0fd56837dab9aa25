"""Experts that read rows of other ranks in shared memory against the all-to-all, bit for bit; and
what is left, and said, when a rank is gone."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptm.common.errors import HangError
from ptm.kernels.permute import combine, permute
from ptm.kernels.shm import make_port
from ptm.mesh.mesh import Mesh, share_groups
from ptm.model.config import ModelConfig
from ptm.model.dispatch import Dispatcher, LocalDispatcher
from ptm.model.experts import Experts
from ptm.model.router import Routing
from ptm.parallel.expert import AllToAllDispatcher, dispatcher_for, local_experts
from ptm.parallel.in_memory import InMemoryDispatcher
from ptm.parallel.recompute import recompute_blocks
from tests.parallel.test_expert import CASES as ROUTED
from tests.parallel.test_expert import any_two
from tests.support.mesh import mesh_of_test
from tests.support.native import needs_library
from tests.support.ranks import RankFailed, run_ranks
from tests.support.tiny import documents, packed, tiny_model

pytestmark = needs_library
E, D, F, A = 8, 64, 96, 2
CONFIG = ModelConfig(num_experts=E, hidden_size=D, moe_intermediate_size=F, num_attention_heads=1)
BF16 = torch.bfloat16


# Tokens of each rank, and where they go. In this order the windows grow, twice.
_ORDER = ("no tokens at all", "odd numbers", "many", "a rank without tokens", "all to one expert",
          "all to the first rank", "idle experts")  # fmt: skip
CASES = {case: ROUTED[case] for case in _ORDER} | {"most": ([611, 40, 333, 1], any_two)}


def shared_mesh(rank: int, world: int, ep: int, timeout_s: float = 60.0) -> Mesh:
    mesh = mesh_of_test(rank, world, ep)
    share_groups(mesh, make_port, timeout_s)
    return mesh


def draw(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype)


def tokens_of(case: str, rank: int) -> list[Tensor]:
    """x (T, D), ids (T, A), weights (T, A) and the gradient (T, D) of one rank."""
    sizes, choose = CASES[case]
    ids = choose(rank, sizes[rank])
    weights = draw(*ids.shape, seed=10 * rank + 1, dtype=torch.float32)
    x, grad = (draw(sizes[rank], D, seed=10 * rank + i) for i in (0, 2))
    return [x, ids, weights, grad]


class Room:
    """A gradient sink that is an fp32 tensor."""

    def __init__(self, like: Tensor) -> None:
        self.into, self.adds = torch.full(like.shape, 0.5), False

    def room(self) -> tuple[Tensor, bool]:
        adds, self.adds = self.adds, True
        return self.into, adds


def experts_of(mine: slice, sinks: bool) -> Experts:
    experts = Experts(CONFIG)
    for seed, name in enumerate(("w1", "w2")):
        whole = draw(*getattr(experts, name).shape, seed=seed, scale=0.1)
        weight = torch.nn.Parameter(whole[mine].clone())
        if sinks:
            weight.grad_sink = Room(weight)  # type: ignore[attr-defined]
        setattr(experts, name, weight)
    return experts


def mixed(
    dispatcher: Dispatcher, experts: Experts, tokens: list[Tensor], times: int = 1
) -> list[Tensor]:
    """y and the gradients of x, the router's weights, w1 and w2, added up over `times`."""
    x, ids, weights, grad = tokens
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    counts = torch.bincount(ids.flatten(), minlength=E)
    y = x
    for _ in range(times):
        y = dispatcher.run(x, Routing(ids, weights, counts, weights), experts)
        y.backward(grad)
    by_w = []
    for weight in (experts.w1, experts.w2):
        sink = getattr(weight, "grad_sink", None)
        by_w.append(weight.grad if sink is None else sink.into)
    assert x.grad is not None and weights.grad is not None
    return [y.detach(), x.grad, weights.grad, *by_w]


def oracle(case: str, mesh: Mesh) -> list[Tensor]:
    """Of this rank, by one process that has the tokens of the ep axis and all experts; its rows by
    the all-to-all's arithmetic, so not those of `moe_mlp` with weights."""
    first = mesh.rank - mesh.ep.get_local_rank()
    parts = [tokens_of(case, first + r) for r in range(mesh.ep.size())]
    x, ids, weights, grad = (torch.cat(column) for column in zip(*parts))
    y, by_x, by_weights, *by_w = mixed(
        OneProcess(), experts_of(slice(0, E), sinks=False), [x, ids, weights, grad]
    )
    sizes = [len(part[0]) for part in parts]
    rows = [whole.split(sizes)[mesh.ep.get_local_rank()] for whole in (y, by_x, by_weights)]
    return [*rows, *(whole[local_experts(mesh, E)] for whole in by_w)]


class OneProcess:
    """A row for each of a token's experts, combined apart."""

    def run(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        place_TA = torch.arange(routing.ids_TA.numel()).view_as(routing.ids_TA)
        rows_SD = permute(x_TD, place_TA, place_TA.numel())
        rows_SD = experts(rows_SD, routing.ids_TA.reshape(-1, 1), None, routing.counts_E)
        return combine(rows_SD, place_TA, routing.weights_TA)


def rows_sent(mesh: Mesh) -> dict[str, int]:
    return {name: entry.sent_bytes for name, entry in mesh.ledger.entries.items()}


def compare_all(rank: int, world: int, ep: int) -> list[str]:
    mesh = shared_mesh(rank, world, ep)
    mine = local_experts(mesh, E)
    found = dispatcher_for(mesh, E, chunks=3)
    assert isinstance(found, InMemoryDispatcher if ep > 1 else LocalDispatcher)
    reference = AllToAllDispatcher(mesh, E) if ep > 1 else OneProcess()
    wrong = []
    for case in CASES:
        for sinks in (False, True):
            results, sent = [], []
            for dispatcher in (reference, found, found) if ep > 1 else (reference,):
                mesh.ledger.entries.clear()
                tokens, experts = tokens_of(case, rank), experts_of(mine, sinks)
                results.append(mixed(dispatcher, experts, tokens, times=1 + sinks))
                sent.append(rows_sent(mesh).get("all_to_all"))
            if not sinks:
                results.append(oracle(case, mesh))
            for i, other in enumerate(results[1:]):
                for what, a, b in zip(("y", "x", "weights", "w1", "w2"), results[0], other):
                    if not torch.equal(a, b):
                        wrong.append(f"{case}, sinks {sinks}, {i}: other bits of {what}")
            if len({*sent}) != 1:
                wrong.append(f"{case}: bytes {sent}")
    mesh.close()
    return wrong


@pytest.mark.parametrize("world, ep", [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_the_bits_are_those_of_the_all_to_all_and_of_one_process(world, ep):
    assert run_ranks(world, compare_all, ep) == [[]] * world


def gradients(model, batch) -> list[Tensor]:
    loss = model.loss(batch)
    grads = torch.autograd.grad(loss.total, list(model.parameters()))
    return [loss.nll_sum.detach(), *grads]


def train_a_model(rank: int, world: int) -> list[str]:
    """Ranks 1 and 3 have no rows at all."""
    mesh = shared_mesh(rank, world, ep=2)
    batch = packed([documents(24, 17, seed=rank)])
    if rank % 2:
        batch = type(batch)(*(column[:0] for column in batch))
    found = dispatcher_for(mesh, 32)
    results, ledgers = [], []
    for dispatcher in (AllToAllDispatcher(mesh, 32), found, found):
        for recompute in (False, True):
            model = tiny_model(dtype=BF16, router_aux_loss_coef=0.1).train()
            for block in model.model.layers:
                block.mlp.dispatcher = dispatcher
                for name, whole in list(block.mlp.experts.named_parameters()):
                    part = whole.detach()[local_experts(mesh, 32)].clone()
                    setattr(block.mlp.experts, name, torch.nn.Parameter(part))
            if recompute:
                recompute_blocks(model.model.layers)
            mesh.ledger.entries.clear()
            results.append(gradients(model, batch))
            entry = mesh.ledger.entries["all_to_all"]
            ledgers.append((recompute, entry.calls, entry.sent_bytes))
    mesh.close()
    same = all(all(map(torch.equal, results[0], other)) for other in results)
    return ([] if same else ["other bits"]) + ([] if len({*ledgers}) == 2 else [f"{ledgers}"])


@pytest.mark.parametrize("world", [2, 4])
def test_a_model_trains_with_ranks_without_rows_and_recomputed(world):
    assert run_ranks(world, train_a_model) == [[]] * world


def grow_in_between(rank: int, world: int) -> list[bool]:
    """Forward of few tokens, all of many, and then the backward of the first."""
    mesh = shared_mesh(rank, world, ep=world)
    x, ids, weights, grad = tokens_of("odd numbers", rank)
    results = []
    for dispatcher in (AllToAllDispatcher(mesh, E), dispatcher_for(mesh, E)):
        experts, few = experts_of(local_experts(mesh, E), sinks=False), x.clone().requires_grad_()
        counts = torch.bincount(ids.flatten(), minlength=E)
        y = dispatcher.run(few, Routing(ids, weights, counts, weights), experts)
        many = mixed(dispatcher, experts, tokens_of("most", rank))
        y.backward(grad)
        assert few.grad is not None
        results.append([y.detach(), few.grad, *many])
    del y
    mapped = [row.split()[0] for row in Path("/proc/self/maps").read_text().splitlines()
              if "memfd:ptm" in row]  # fmt: skip
    found = [all(map(torch.equal, *results)), len(mapped) == world + 1]  # a port each, and windows
    mesh.close()
    return found


def test_windows_grow_between_a_forward_and_its_backward_and_the_old_ones_go():
    assert run_ranks(2, grow_in_between) == [[True, True]] * 2


def in_fp32(rank: int, world: int) -> list[str]:
    mesh = shared_mesh(rank, world, ep=world)
    mine = local_experts(mesh, E)
    x, ids, weights, grad = tokens_of("many", rank)
    tokens = [x.float(), ids, weights, grad.float()]
    found = dispatcher_for(mesh, E, chunks=2)
    assert isinstance(found, InMemoryDispatcher)
    ways = found, found.otherwise, AllToAllDispatcher(mesh, E)
    results = [mixed(way, experts_of(mine, sinks=False).float(), tokens) for way in ways]
    mesh.close()
    return ["other bits"] * sum(not all(map(torch.equal, results[0], r)) for r in results[1:])


def test_what_the_kernel_does_not_serve_is_sent():
    assert run_ranks(2, in_fp32) == [[]] * 2


def without_memory(rank: int, world: int) -> str:
    return type(dispatcher_for(mesh_of_test(rank, world, ep=world), E)).__name__


def test_without_shared_memory_rows_are_sent():
    assert run_ranks(2, without_memory) == ["AllToAllDispatcher"] * 2


def forward_only(rank: int, world: int) -> list[bool]:
    mesh = shared_mesh(rank, world, ep=world)
    x, ids, weights, _ = tokens_of("many", rank)
    counts = torch.bincount(ids.flatten(), minlength=E)
    experts = experts_of(local_experts(mesh, E), sinks=False)
    routing = Routing(ids, weights, counts, weights)
    ways = AllToAllDispatcher(mesh, E), dispatcher_for(mesh, E)
    with torch.no_grad():
        a, b = (way.run(x, routing, experts) for way in ways)
    experts.requires_grad_(False)  # frozen: rows alone have a gradient
    grads = []
    for way in ways:
        rows = x.clone().requires_grad_()
        way.run(rows, routing, experts).sum().backward()
        grads.append(rows.grad)
    mesh.close()
    return [torch.equal(a, b), torch.equal(*grads)]


def test_without_gradients_and_with_frozen_experts():
    assert run_ranks(2, forward_only) == [[True, True]] * 2


def names_the_lost(rank: int, world: int, how: str, folder: Path) -> None:
    mesh = shared_mesh(rank, world, ep=world, timeout_s=3.0)
    found, experts = dispatcher_for(mesh, E), experts_of(local_experts(mesh, E), sinks=False)
    tokens = tokens_of("most", rank)
    mixed(found, experts, tokens)
    if rank == 1:
        (folder / "pid").write_text(str(os.getpid()))
        if how == "between":
            end_at_once()
        threading.Timer(0.2, end_at_once).start()
    started = time.monotonic()
    with pytest.raises(HangError) as caught:
        while True:
            mixed(found, experts, tokens)
            started = time.monotonic()
    (folder / f"heard-{rank}").write_text(f"{time.monotonic() - started:.3f} {caught.value}")
    mesh.close()


def end_at_once() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def shared_files() -> set[str]:
    return {p.name for p in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()


@pytest.mark.parametrize("how", ["between", "within"])
def test_the_others_name_a_rank_that_was_killed_and_nothing_is_left(how, tmp_path):
    before = shared_files()
    with pytest.raises(RankFailed, match="rank 1 of 4: died with exit code -9"):
        run_ranks(4, names_the_lost, how, tmp_path)
    pid = (tmp_path / "pid").read_text()
    for rank in (0, 2, 3):
        took, _, text = (tmp_path / f"heard-{rank}").read_text().partition(" ")
        assert float(took) < 2.5
        assert re.match(rf"ranks=rank 1 \(pid {pid}\) has left: ", text), text
    assert shared_files() <= before
