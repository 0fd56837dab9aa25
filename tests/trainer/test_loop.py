"""The loop with a toy model behind its seams: one decision on all ranks."""

import functools
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ptm.common.errors import DivergedError, Requeue
from ptm.data.rewards import RewardError
from ptm.engine.config import EngineConfig
from ptm.engine.engine import PagedEngine, UnitSpec
from ptm.engine.layout import Named
from ptm.optim.adamw import adamw
from ptm.optim.config import OptimConfig
from ptm.trainer.config import TrainConfig
from ptm.trainer.loop import Run, fit
from ptm.trainer.metrics import LogConfig, Metrics, WandbMode
from ptm.trainer.objectives import pretrain
from ptm.trainer.state import TrainState
from tests.support.mesh import mesh_of_test
from tests.support.paged import in_memory
from tests.support.ranks import run_ranks


class Loss(NamedTuple):
    nll_sum: Tensor
    tokens: Tensor
    aux_sum: None = None

    @property
    def total(self) -> Tensor:
        return self.nll_sum


class Toy(nn.Module):
    """A linear map behind the model's seam; a label of -1 makes its loss not a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)

    def loss(self, batch: Any) -> Loss:
        x, mask = batch
        nll = ((self.inner(x) ** 2).sum(-1) * mask).sum()
        return Loss(nll.float(), mask.sum().long())

    def update_router_bias(self, counts_LE: Tensor) -> None:
        del counts_LE

    def take_expert_counts(self) -> Tensor:
        return torch.ones(1, 2, dtype=torch.int64)


class ToyBatches:
    def __init__(self, rank: int, world: int, change: Callable[[int, Tensor], Tensor]) -> None:
        self.rank, self.world, self.change = rank, world, change

    def micro_batches(self, step: int) -> Sequence[Any]:
        rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        mine = self.change(step, rows.tensor_split(self.world)[self.rank].clone())
        return [(part, torch.ones(len(part))) for part in mine.split(2)]


def run_toy(
    rank: int,
    world: int,
    folder: str,
    change: Callable[[int, Tensor], Tensor],
    *,
    steps: int = 6,
    max_skipped: int = 2,
) -> tuple[str, int, int, list[int], list[bytes]]:
    mesh = mesh_of_test(rank, world)
    model = Toy()
    update = functools.partial(adamw, config=OptimConfig())
    values = {name: param.detach().clone() for name, param in model.named_parameters()}
    members = [Named(name, tuple(value.shape), False) for name, value in values.items()]
    engine = PagedEngine(
        model,
        [UnitSpec("root", model.inner, members)],
        mesh=mesh,
        config=EngineConfig(page_mib=1),
        zero=1,
        dtype=torch.float32,
        update=update,
        clip=1.0,
        open_tiers=in_memory,
    )
    for name, value in values.items():
        engine.fill(name, value)
    engine.publish()
    state, saved = TrainState(run_id="toy"), []
    log = LogConfig(wandb=WandbMode.off)
    metrics = Metrics(Path(folder), log, total_steps=steps, is_main=rank == 0)
    run = Run(
        train=TrainConfig(steps=steps, warmup_steps=0, lr=1e-2, max_skipped=max_skipped),
        mesh=mesh,
        engine=engine,
        objective=pretrain,
        batches=ToyBatches(rank, world, change),
        state=state,
        metrics=metrics,
        flops_per_token=1.0,
        peak_flops=1.0,
        save_every=4,
        evaluate_every=0,
        save=lambda state, **_: saved.append(state.step),
        evaluate=lambda: {"eval_bits_per_byte": 1.0},
    )
    how = "done"
    try:
        fit(run)
    except (DivergedError, Requeue, RewardError) as error:
        how = f"{type(error).__name__} {error}"
    metrics.close()
    engine.drain()
    engine.weights.ready(engine.weights.units[0])
    weights = [p.detach().numpy().tobytes() for p in model.parameters()]
    engine.close()
    return how, state.step, state.skipped, saved, weights


def unchanged(step: int, rows: Tensor) -> Tensor:
    return rows


def whole_run(rank: int, world: int, folder: str) -> Any:
    return run_toy(rank, world, folder, unchanged)


def test_a_run_saves_when_due_and_at_its_end(tmp_path: Path) -> None:
    for how, steps, skipped, saved, _ in run_ranks(2, whole_run, str(tmp_path)):
        assert (how, steps, skipped, saved) == ("done", 6, 0, [4, 6])
    steps = [json.loads(t) for t in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 6 and all(record["sent_bytes"]["all_reduce"] for record in steps)
    (ledger,) = _ledgers(tmp_path)
    assert ledger["step"] == 6 and ledger["collectives"]["all_reduce"]["calls"] >= 6


def _ledgers(folder: Path) -> list[dict[str, Any]]:
    events = [json.loads(text) for text in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["kind"] == "ledger"]


def nan_on_rank_1(rank: int, world: int, folder: str, bad_steps: list[int]) -> Any:
    def change(step: int, rows: Tensor) -> Tensor:
        if rank == 1 and step in bad_steps:
            rows[0, 0] = torch.nan
        return rows

    return run_toy(rank, world, folder, change)


def test_nan_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, nan_on_rank_1, str(tmp_path), [1, 3, 4])
    assert first[:4] == second[:4] == ("done", 6, 3, [4, 6])
    assert first[4] == second[4]
    assert (tmp_path / "events.jsonl").read_text().count('"kind":"skip"') == 3


def test_too_many_skips_in_a_row_stop_all_ranks_and_name_the_layer(tmp_path: Path) -> None:
    for how, steps, skipped, saved, _ in run_ranks(2, nan_on_rank_1, str(tmp_path), [2, 3, 4, 5]):
        assert how.startswith("DivergedError train.max_skipped=2: 3 steps in a row")
        assert "step 5" in how and "inner.weight" in how
        assert (steps, skipped, saved[-1]) == (5, 3, 5)
    assert [ledger["step"] for ledger in _ledgers(tmp_path)] == [5]


def signal_on_rank_1(rank: int, world: int, folder: str, number: int) -> Any:
    def change(step: int, rows: Tensor) -> Tensor:
        if rank == 1 and step == 2:
            os.kill(os.getpid(), number)
        return rows

    return run_toy(rank, world, folder, change)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, number: int) -> None:
    first, second = run_ranks(2, signal_on_rank_1, str(tmp_path), int(number))
    assert first[:4] == second[:4]
    assert first[0].startswith("Requeue saved after step 3") and first[3] == [3]


def ends_in_its_batches(rank: int, world: int, folder: str, last: int, error: str) -> Any:
    def change(step: int, rows: Tensor) -> Tensor:
        if step == last:
            raise {"Requeue": Requeue, "RewardError": RewardError}[error](f"in step {step}")
        return rows

    return run_toy(rank, world, folder, change)


@pytest.mark.parametrize("error", ["Requeue", "RewardError"])
@pytest.mark.parametrize("last, saved", [(0, []), (2, [2]), (5, [4, 5])])
def test_batches_that_end_the_run_lose_no_step(
    tmp_path: Path, error: str, last: int, saved: list[int]
) -> None:
    for found in run_ranks(2, ends_in_its_batches, str(tmp_path), last, error):
        assert found[:4] == (f"{error} in step {last}", last, 0, saved)
    is_stop = '"kind":"stop"' in (tmp_path / "events.jsonl").read_text()
    assert is_stop == (error == "Requeue")


def test_same_seed_same_bits(tmp_path: Path) -> None:
    a = run_ranks(2, whole_run, str(tmp_path / "a"))
    b = run_ranks(2, whole_run, str(tmp_path / "b"))
    assert [rank[4] for rank in a] == [rank[4] for rank in b]
