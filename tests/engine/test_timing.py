"""When updates run: a guess that was wrong leaves no trace, late weights are late by one step."""

import math
from dataclasses import replace

import pytest
import torch

from ptm.engine.config import EngineConfig, UpdateKind
from ptm.engine.layout import PageMap
from ptm.engine.timing import Decision, Exact
from tests.support.mesh import mesh_of_test
from tests.support.paged import MODEL, make_engine, run_steps, whole_state
from tests.support.ranks import run_ranks

WIDE = replace(MODEL, moe_intermediate_size=512, num_experts=8, num_hidden_layers=4)


def _run(rank, world, keys, clips, steps, first=0):
    """Steps with a clip of their own; returns losses, states, report."""
    mesh = mesh_of_test(rank, world)
    engine = make_engine(mesh, zero=3, config=EngineConfig(page_mib=1, **keys))
    outcomes = []
    for step in range(first, first + steps):
        engine.clip = clips[step % len(clips)]
        outcomes += run_steps(engine, mesh, range(step, step + 1), micro_batches=2)
    state = whole_state(engine)
    report = engine.report()
    engine.close()
    return [o.loss.hex() for o in outcomes], state, report


def _same(a, b):
    return all(
        x[0] == y[0] and all((x[1][n][1] == y[1][n][1]).all() for n in x[1]) for x, y in zip(a, b)
    )


@pytest.mark.parametrize("world", [1, 2])
def test_a_guess_changes_no_bit_right_or_wrong(world, tmp_path):
    # Norms here lie between 0.1 and 3, so clips of 100 never cut and of 0.05 always do; a wide step
    # after another makes the guess of the third one wrong.
    clips = [100.0, 100.0, 0.05, 100.0, 100.0, 100.0]
    wanted = run_ranks(world, _run, {}, clips, 9)
    found = run_ranks(world, _run, {"ssd_path": str(tmp_path)}, clips, 9)
    assert _same(found, wanted)
    for _, _, report in found:
        assert report["updates_guessed"] >= 4
        assert 1 <= report["updates_undone"] < report["updates_guessed"]


def _nan(rank, world, folder):
    mesh = mesh_of_test(rank, world)
    config = EngineConfig(page_mib=1, ssd_path=folder)
    engine = make_engine(mesh, zero=3, config=config, clip=0.0)
    run_steps(engine, mesh, range(2))
    before = whole_state(engine)
    poisoned = engine.grads._add
    is_done = []

    def poison(done, group, pieces_NS):
        if rank == world - 1 and not is_done:
            is_done.append(True)
            pieces_NS = pieces_NS.clone()
            pieces_NS[0, 0] = torch.nan
        poisoned(done, group, pieces_NS)

    engine.grads._add = poison
    (skipped,) = run_steps(engine, mesh, range(2, 3))
    engine.grads._add = poisoned
    after = whole_state(engine)
    (good,) = run_steps(engine, mesh, range(3, 4))
    report = engine.report()
    engine.close()
    is_same = all((before[n][1] == after[n][1]).all() for n in before)
    return skipped.is_skipped, skipped.where, is_same, good.is_skipped, report


@pytest.mark.parametrize("world", [1, 2])
def test_a_non_finite_gradient_never_reaches_weights_guessed_ahead(world, tmp_path):
    for is_skipped, where, is_same, later, report in run_ranks(world, _nan, str(tmp_path)):
        assert is_skipped and "parameters)" in where and is_same and not later
        assert report["updates_undone"] == 1


def _late(rank, world, num_exact):
    """Losses of bounded updates, and of weights that are taken one step late by hand: what the last
    update changed is foreseen once more, and taken back before the next."""
    from ptm.model.init import new_weight
    from ptm.model.transformer import Transformer
    from tests.support.paged import MODEL, OPTIM, batch

    mesh = mesh_of_test(rank, world)
    config = EngineConfig(page_mib=1, update=UpdateKind.bounded)
    engine = make_engine(mesh, zero=3, config=config, clip=0.0, num_exact=num_exact)
    found = [o.loss for o in run_steps(engine, mesh, range(8))]
    engine.close()

    model = Transformer(MODEL)
    for name, param in model.named_parameters():
        param.data.copy_(new_weight(MODEL, name, param.shape, seed=1))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    decays = {param: group["weight_decay"] for group in groups for param in group["params"]}
    wanted, waiting, foreseen, kept = [], None, {}, {}
    for step in range(8):
        loss = model.train().loss(batch(step))
        mean = loss.nll_sum / loss.tokens
        grads = torch.autograd.grad(mean, list(model.parameters()))
        wanted.append(mean.item())
        is_exact = step + 1 <= num_exact
        for due in [waiting, grads] if is_exact else [waiting]:
            if due is not None:
                for param, grad in zip(model.parameters(), due):
                    param.data -= foreseen.get(param, 0)
                    param.grad, kept[param] = grad, param.data * (1 - 1e-2 * decays[param])
                optimizer.step()
                for param in decays if not is_exact else ():
                    foreseen[param] = param.data - kept[param]
                    param.data += foreseen[param]
        waiting = None if is_exact else grads
    return found, wanted


@pytest.mark.parametrize("world, num_exact", [(1, 0), (2, 3)])
def test_bounded_is_one_step_late_after_warm_up_and_skips_nothing(world, num_exact):
    for found, wanted in run_ranks(world, _late, num_exact):
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, wanted)), (found, wanted)


def _bounded(rank, world, folder, first, steps):
    keys = {"ssd_path": folder, "update": UpdateKind.bounded}
    return _run(rank, world, keys, [1.0], steps, first)


def test_bounded_repeats_itself_and_goes_on_from_its_pages(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    a = run_ranks(2, _bounded, str(tmp_path / "a"), 0, 6)
    b = run_ranks(2, _bounded, str(tmp_path / "b"), 0, 6)
    assert _same(a, b)
    again = run_ranks(2, _bounded, str(tmp_path / "a"), 6, 1)
    assert all(math.isfinite(float.fromhex(loss)) for loss in again[0][0])


def _free(rank, world):
    losses, _, report = _run(rank, world, {"update": UpdateKind.lock_free}, [1.0], 12)
    return losses, report


def test_lock_free_trains_and_counts_how_late_it_is():
    for losses, report in run_ranks(2, _free):
        assert all(math.isfinite(float.fromhex(loss)) for loss in losses)
        assert {"late_steps_mean", "late_steps_most", "updates_merged"} <= report.keys()


class _Told:
    """An updater that notes what it is told, and runs what comes after updates at once."""

    names, is_inline = ("a", "b"), False

    def __init__(self) -> None:
        self.told: list[str] = []
        self.running = set(self.names)

    def is_running(self, unit: str) -> bool:
        return unit in self.running

    def wait(self, unit: str) -> None: ...

    def submit(self, units: list[str], **values: object) -> None:
        self.told += [f"update {unit}" for unit in units]

    def discard(self, unit: str) -> None:
        self.told.append(f"forget {unit}")

    def then(self, job) -> None:
        job()


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("next_use", ["before_gather", "before_landing"])
def test_sums_of_a_right_guess_are_forgotten_once(commits: bool, next_use: str) -> None:
    """With the commit that follows its updates, or else before a gather or new sums."""
    updater = _Told()
    timing = Exact(updater, lambda: None)  # type: ignore[arg-type]
    decision = Decision(1.0, 1e-3, 1, 8.0)
    timing.guess(decision)
    timing.landed("b")
    timing.landed("a")
    timing.decided(decision)
    assert updater.told == ["update b", "update a"]
    if commits:
        timing.then(lambda: updater.told.append("commit"))
        assert updater.told[2:] == ["commit", "forget a", "forget b"]
    for unit in updater.names:
        getattr(timing, next_use)(unit)
    assert updater.told[-2:] == ["forget a", "forget b"]
    assert len(updater.told) == 4 + commits


def test_sums_that_a_right_guess_has_used_are_forgotten_at_once() -> None:
    updater = _Told()
    timing = Exact(updater, lambda: None)  # type: ignore[arg-type]
    decision = Decision(1.0, 1e-3, 1, 8.0)
    timing.guess(decision)
    timing.landed("b")
    updater.running.discard("b")
    timing.landed("a")
    timing.decided(decision)
    assert updater.told == ["update b", "update a", "forget b"]
    timing.then(lambda: None)
    assert updater.told[3:] == ["forget a"]


def _wide(rank: int, world: int, folder: str, budget: str) -> tuple[float, int, PageMap]:
    """Pages written in a step whose guess is right, and how many of sums its schedule holds."""
    mesh, steps = mesh_of_test(rank, world), 8
    config = EngineConfig(page_mib=1, ssd_path=folder, cpu_bytes=budget)
    engine = make_engine(mesh, zero=3, config=config, clip=100.0, model=WIDE)
    run_steps(engine, mesh, range(8))
    engine.drain()
    engine.store.wait_commit()
    before = engine.report()["pages_writes"]
    run_steps(engine, mesh, range(8, 8 + steps))
    engine.drain()
    engine.store.wait_commit()
    assert engine.report()["updates_guessed"] > steps
    assert engine.tiers.paging is not None and engine.tiers.paging.schedule is not None
    held, pages = len(engine.tiers.paging.schedule.held), engine.pages
    writes = (engine.report()["pages_writes"] - before) / steps
    engine.close()
    return writes, held, pages


def test_of_a_guess_only_what_is_durable_is_written(tmp_path):
    """Its sums are not, where memory has room for them."""
    ((writes, held, pages),) = run_ranks(1, _wide, str(tmp_path), "30MiB")
    assert held == pages.grads.num_pages
    assert pages.states.stop <= writes < pages.states.stop + 3  # 23 of 20 where sums are written
