"""The loop. Every training mode runs through it; what differs is passed in.

It saves and evaluates through callables (jobs are strangers to each other), stops only at step
boundaries that all ranks agree on, and leaves by an exception that carries the exit code: Requeue
(75) after a signal, DivergedError (76) after too many skipped steps in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from ptm.common.device import memory_bytes, sync
from ptm.common.errors import DivergedError, Requeue, line
from ptm.data.rewards import RewardError
from ptm.mesh.mesh import Mesh
from ptm.optim.schedule import learning_rate
from ptm.trainer.clock import Clock
from ptm.trainer.config import Schedule, TrainConfig
from ptm.trainer.metrics import Metrics, expert_load
from ptm.trainer.objectives import Objective
from ptm.trainer.signals import StopRequest, stop_requests
from ptm.trainer.state import TrainState, seed_step
from ptm.trainer.step import Engine, Outcome, train_step
from ptm.trainer.traffic import Traffic


class Batches(Protocol):
    """This rank's micro-batches of one step: a pure function of the step."""

    def micro_batches(self, step: int) -> Sequence[Any]: ...


class Summary(Protocol):
    """What is logged of a step's metrics, sums over all ranks, and its tokens."""

    def __call__(self, sums: Mapping[str, float], tokens: int) -> Mapping[str, float]: ...


def per_token(sums: Mapping[str, float], tokens: int) -> Mapping[str, float]:
    """Each sum divided by the step's tokens."""
    return {name: total / max(tokens, 1) for name, total in sums.items()}


@dataclass(frozen=True)
class Run:
    """Everything the loop needs, wired by ptm/build.py."""

    train: TrainConfig
    mesh: Mesh
    engine: Engine
    objective: Objective
    batches: Batches
    state: TrainState
    metrics: Metrics
    flops_per_token: float
    peak_flops: float
    save_every: int
    evaluate_every: int
    save: Callable[..., None]
    """save(state, is_best=, block=)"""
    evaluate: Callable[[], dict[str, float]]
    metric_names: tuple[str, ...] = ()
    "Sums of the objective's that are to be logged."
    summary: Summary = per_token
    best_key: str = "eval_bits_per_byte"
    "Which of the evaluation's numbers tells the best step, the one where it is lowest."
    stop: StopRequest = field(default_factory=StopRequest)


def fit(run: Run) -> None:
    """Train to the last step. Raises Requeue or DivergedError after saving."""
    state, clock, traffic = run.state, Clock(), Traffic(run.engine.report)
    with stop_requests(run.stop) as stop, _last_words(run):
        while state.step < run.train.steps:
            seed_step(run.train.seed, state.step, run.mesh.rank)
            with clock.span("data"):
                batches = _batches(run)
            lr = rate(run.train, state.step)
            waited_s = run.mesh.ledger.seconds
            outcome = train_step(
                run.engine,
                run.objective,
                batches,
                lr=lr,
                flags=[float(bool(stop))],
                device=run.mesh.device,
                metric_names=run.metric_names,
            )
            sync(run.mesh.device)
            _advance(state, outcome, run.engine.updates)
            values = _values(run, outcome, lr, clock, run.mesh.ledger.seconds - waited_s)
            values |= traffic.take()
            is_last = state.step == run.train.steps
            is_best = False
            if due(state.step, run.evaluate_every) or is_last:
                values |= run.evaluate()
                is_best = _note_best(state, values[run.best_key])
                clock.take()
                traffic.take()
            run.metrics.log(state.step, values)
            run.engine.commit(state.step, {"train": state.to_json()})
            if outcome.is_skipped:
                _skip(run, outcome)
            _stop_if_asked(run, outcome)
            if due(state.step, run.save_every) or is_last or is_best:
                _save(run, is_best=is_best, block=is_last)


def _batches(run: Run) -> Sequence[Any]:
    """Of the next step. Where answers are drawn for it the ranks may agree to end the run: what is
    done is saved first."""
    try:
        return run.batches.micro_batches(run.state.step)
    except (Requeue, RewardError) as error:
        if isinstance(error, Requeue):
            _note_stop(run)
        if run.state.step:
            _save(run, is_best=False, block=True)
        raise


def _save(run: Run, *, is_best: bool, block: bool) -> None:
    """A portable checkpoint, unless the recipe wants none: the engine's disk has the step."""
    if run.save_every:
        run.save(run.state, is_best=is_best, block=block)
    else:
        run.engine.drain()


@contextmanager
def _last_words(run: Run) -> Iterator[None]:
    """At the end and at a stop: what was sent, and the schedule of the pages, for people."""

    def leave() -> None:
        run.metrics.ledger(run.state.step, run.mesh.ledger.entries)
        if run.mesh.is_main:
            run.engine.leave(run.metrics.run_dir)

    try:
        yield
    except (Requeue, DivergedError):
        leave()
        raise
    leave()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def rate(train: TrainConfig, step: int) -> float:
    """Learning rate of step `step` (0 is the first) by the `train` section."""
    return learning_rate(
        step,
        steps=train.steps,
        peak=train.lr,
        floor=train.lr * train.min_lr,
        warmup_steps=train.warmup_steps,
        is_cosine=train.schedule is Schedule.cosine,
    )


def _advance(state: TrainState, outcome: Outcome, updates: int) -> None:
    state.step += 1
    state.updates = updates
    state.tokens += outcome.tokens
    state.skipped += outcome.is_skipped
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if outcome.is_skipped else 0


def _note_best(state: TrainState, found: float) -> bool:
    if state.best is None or found < state.best:
        state.best = found
        return True
    return False


def _values(
    run: Run, outcome: Outcome, lr: float, clock: Clock, communication_s: float
) -> dict[str, Any]:
    step_s, spans = clock.take()
    data_s = spans.get("data", 0.0)
    tokens_per_s = outcome.tokens / step_s
    model: Any = run.engine.model
    counts_LE = run.mesh.sum_counts(model.take_expert_counts())
    if not outcome.is_skipped:
        model.update_router_bias(counts_LE)
    return {
        "loss": outcome.loss,
        "tokens": run.state.tokens,
        "tokens_per_s": tokens_per_s,
        "lr": lr,
        "grad_norm": outcome.grad_norm,
        "mfu": tokens_per_s * run.flops_per_token / (run.peak_flops * run.mesh.world),
        "memory_bytes": memory_bytes(run.mesh.device),
        "step_s": step_s,
        "data_s": data_s,
        "communication_s": communication_s,
        "compute_s": max(0.0, step_s - data_s - communication_s),
        "skipped": run.state.skipped,
        "aux_loss": outcome.flags[1] / max(outcome.tokens, 1),
        "expert_load": expert_load(counts_LE, ep=run.mesh.ep.size()),
        **run.summary(dict(zip(run.metric_names, outcome.flags[2:])), outcome.tokens),
    }


def _skip(run: Run, outcome: Outcome) -> None:
    state = run.state
    run.metrics.event("skip", step=state.step, where=outcome.where, in_a_row=state.skipped_in_a_row)
    if state.skipped_in_a_row > run.train.max_skipped:
        in_a_row, state.skipped_in_a_row = state.skipped_in_a_row, 0  # the next start may try anew
        _save(run, is_best=False, block=True)
        rule = (
            f"{in_a_row} steps in a row had a non-finite gradient, "
            f"up to step {state.step}, in {outcome.where}"
        )
        remedy = "lower train.lr (it may change on resume), or look at the data of these steps"
        raise DivergedError(line("train.max_skipped", run.train.max_skipped, rule, remedy))


def _stop_if_asked(run: Run, outcome: Outcome) -> None:
    if outcome.flags[0] and run.state.step < run.train.steps:
        _note_stop(run)
        _save(run, is_best=False, block=True)
        raise Requeue(f"saved after step {run.state.step}; the same command goes on from there")


def _note_stop(run: Run) -> None:
    signal = run.stop.signal_name or "from another rank"
    run.metrics.event("stop", step=run.state.step, signal=signal)
