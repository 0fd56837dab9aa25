"""`ptm bench experts`: every way computes the same, and its table."""

import io

import pytest
from rich.console import Console

from ptm.bench.contestant import Runner
from ptm.bench.experts import contestants, rows, table
from ptm.bench.interleave import Result, join
from ptm.bench.layer import Layer
from ptm.jobs import StepBenchJob
from ptm.kernels.shm import make_port
from ptm.mesh.mesh import share_groups
from ptm.model.dispatch import LocalDispatcher
from ptm.parallel.expert import AllToAllDispatcher
from ptm.parallel.in_memory import InMemoryDispatcher
from ptm.recipe import load_recipe
from tests.support.mesh import mesh_of_test
from tests.support.native import needs_library
from tests.support.ranks import run_ranks

WORDS = ["recipe=m32", "model.scale=debug", "train.seq_len=32", "train.batch_tokens=128"]
WORDS += ["train.micro_batch_size=2"]


def turns(rank: int, world: int) -> list[dict]:
    mesh, recipe = mesh_of_test(rank, world, ep=2), load_recipe([*WORDS, "engine.ep=2"])
    share_groups(mesh, make_port, 60.0)
    found = []
    for options in ({}, {"is_sent": True}, {"is_alone": True}):
        layer = Layer(recipe, mesh, **options)
        found.append(Runner(recipe, mesh, layer, "experts").turn(2))
        kinds = (InMemoryDispatcher, AllToAllDispatcher, LocalDispatcher)
        assert isinstance(layer.dispatcher, kinds[len(found) - 1])
    mesh.close()
    return found


@needs_library
def test_rows_in_place_and_sent_give_the_same_and_the_table_has_a_line_each():
    one, other = run_ranks(2, turns)
    joined = [join([a, b]) for a, b in zip(one, other)]
    layers = load_recipe(WORDS).model.num_hidden_layers
    assert [one["report"]["calls"] for one in joined] == [2 * 2 * layers] * 3
    assert joined[0]["loss"] == joined[1]["loss"] > 0
    names = ("in place", "memory", "alone")
    results = [Result(name, [round_]) for name, round_ in zip(names, joined)]
    results.append(Result("gloo", error="no network"))
    found = {"ranks": 2, "rows": rows(results, 2)}
    assert found["rows"][0]["seconds_ratio"]["median"] == 1.0
    assert found["rows"][1]["cpu_s"]["median"] == joined[1]["cpu_s"] / (4 * layers)
    shown = io.StringIO()
    Console(file=shown, width=120).print(table(found))
    assert all(f"│ {name}" in shown.getvalue() for name in (*names, "gloo"))


@pytest.mark.parametrize("word, ep", [((), 4), (("engine.ep=2",), 2)])
def test_all_ranks_share_the_experts_unless_told(word, ep):
    job = StepBenchJob(bench="experts", ranks=4)
    if word:
        job = StepBenchJob(bench="experts", ranks=4, engine=load_recipe(word).engine)
    for one in contestants(job, word):
        assert one.words[-1] == f"engine.ep={ep}"
