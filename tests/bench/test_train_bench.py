"""`ptm bench train`: its peers learn, say what is missing, and the shares of a step add up."""

import io
import sys

import pytest
import torch
from rich.console import Console

from ptm.bench.contestant import Runner
from ptm.bench.peers import PEERS, make_peer, new_mixtral
from ptm.bench.train import shares
from ptm.common.errors import KernelError
from ptm.recipe import load_recipe
from ptm.trainer.objectives import pretrain
from ptm.trainer.step import train_step
from tests.support.mesh import mesh_of_test
from tests.support.ranks import run_ranks

WORDS = ["recipe=m32", "model.scale=debug", "train.seq_len=32", "train.batch_tokens=128"]
WORDS += ["train.micro_batch_size=1", "engine.kind=fsdp"]


def test_without_transformers_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(KernelError, match=r"bench=train: .*; pip install .* transformers"):
        new_mixtral(load_recipe(WORDS).model)


def test_shares_are_of_the_whole_step():
    ops = {"mm": 1.0, **{f"op {i}": 0.01 for i in range(20)}}
    table = shares({"seconds": 2.0, "ops": ops, "waited_s": 0.5})
    shown = io.StringIO()
    Console(file=shown, width=120).print(table)
    rows = [[cell.strip() for cell in row.split("│")[1:4]] for row in shown.getvalue().split("\n")]
    for row in (
        ["mm", "1.000", "50.0 %"],
        ["other ops", "0.070", "3.5 %"],
        ["no op: Python, updates, waiting", "0.800", "40.0 %"],
        ["of it waiting for ranks", "0.500", "25.0 %"],
    ):
        assert row in rows, rows


def _losses(rank: int, world: int, peer: str) -> list[float]:
    mesh, recipe = mesh_of_test(rank, world), load_recipe(WORDS)
    runner = Runner(recipe, mesh, make_peer(peer, recipe, mesh), peer)
    batches = runner.batches(0)  # two micro-batches
    device = torch.device("cpu")
    return [
        train_step(runner.engine, pretrain, batches, lr=3e-3, flags=[], device=device).loss
        for _ in range(8)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_learns_rows_by_heart(peer):
    pytest.importorskip("transformers", reason="pip install -c constraints.txt transformers")
    one, other = run_ranks(2, _losses, peer)
    assert one == other
    assert 6.5 < one[0] < 8.0 and one[-1] < one[0] - 1.0, one
