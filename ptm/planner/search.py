"""What else would fit where a job does not.

Changes are tried from the mildest to the hardest, each priced like the job itself: first what
leaves the model as it is, then other sizes that the recipe has, then more machines, then a smaller
model, and last a machine with more memory. Where too few single changes fit, they are tried again
on top of all the mild ones together. It is a search for advice, not for the best plan: only memory
counts, not speed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from ptm.common.plan import Plan
from ptm.common.units import GIB, MIB, format_bytes
from ptm.planner.hardware import Hardware
from ptm.planner.job import Job
from ptm.planner.memory import Memory
from ptm.planner.price import plan_of, price

ENOUGH = 3
"""Changes to offer at least."""
_MOST_RANKS = 4096


class Change(NamedTuple):
    """Words that turn the job into one that fits, and the plan of that."""

    words: str
    plan: Plan


def changes(job: Job, hardware: Hardware, others: Iterable[tuple[str, Job]] = ()) -> list[Change]:
    """Changes that fit, mildest first; `others` are jobs of other sizes, smaller ones last.

    The last of them ask for a machine with more memory, for the job as it is and, where little else
    fits, for milder ones; where only a budget of the recipe is short, the first names that instead.
    """
    others = list(others)
    words, milder = _mildest(job)
    found = list(_fitting(_budgets(job, hardware), hardware))
    found += _fitting(_one_change(job), hardware)
    found += _fitting(others, hardware)
    found += _fitting(_structural(job, hardware), hardware)
    if len(found) < ENOUGH and words:
        more = ((f"{words} {other}", changed) for other, changed in _structural(milder, hardware))
        found += _fitting(more, hardware)
    if len(found) < ENOUGH:
        shrunk = ((f"{words} {other}".strip(), changed) for other, changed in _shrunk(milder))
        found += itertools.islice(_fitting(shrunk, hardware), ENOUGH - len(found))
    larger = [_larger_machine("", job, hardware)]
    if len(found) + 1 < ENOUGH:
        smaller = [(words, milder)] * bool(words) + others
        larger += [_larger_machine(words, other, hardware) for words, other in smaller]
    return found + [change for change in larger if change is not None]


def _fitting(candidates: Iterable[tuple[str, Job]], hardware: Hardware) -> Iterator[Change]:
    for words, job in candidates:
        if price(job, hardware).memory.fits:
            yield Change(words, plan_of(job, hardware))


def _budgets(job: Job, hardware: Hardware) -> Iterator[tuple[str, Job]]:
    """Every budget of the recipe that is too small as large as it must be, in whole MiB."""
    short = {t.why: t for t in price(job, hardware).memory.tiers if not t.fits}
    needed = {
        key: -(-short[f"engine.{key}"].needed_bytes // MIB)
        for key in ("cpu_bytes", "ssd_bytes")
        if f"engine.{key}" in short
    }
    if needed:
        words = " ".join(f"engine.{key}={size}MiB" for key, size in needed.items())
        yield words, replace(job, **{key: size * MIB for key, size in needed.items()})


def _one_change(job: Job) -> Iterator[tuple[str, Job]]:
    """Changes that leave the model and its training as they are."""
    if job.micro_rows > 1:
        yield "train.micro_batch_size=1", replace(job, micro_batch_size=1)
    if job.recompute == "none":
        yield "train.recompute=block", replace(job, recompute="block")
    if job.has_snapshot:
        yield "checkpoint.background=false", replace(job, has_snapshot=False)
    if job.zero in (1, 2):
        yield "engine.zero=3", replace(job, zero=3)
    most = math.gcd(job.ranks, job.model.num_experts)
    if most > job.ep and most % job.ep == 0:
        yield f"engine.ep={most}", replace(job, ep=most)
    if job.precision == "fp32":
        yield "train.precision=bf16", replace(job, precision="bf16")


def _mildest(job: Job) -> tuple[str, Job]:
    """All mild changes at once."""
    words = []
    while (step := next(_one_change(job), None)) is not None:
        words.append(step[0])
        job = step[1]
    return " ".join(words), job


def _structural(job: Job, hardware: Hardware) -> Iterator[tuple[str, Job]]:
    """More machines, shorter rows, fewer layers, fewer or smaller experts: the most that fit."""

    def ranks(n: int) -> Job:
        return replace(job, ranks=n)

    def model(**keys: int) -> Job:
        return replace(job, model=replace(job.model, **keys))

    m, fits = job.model, _fits_on(hardware)
    for words, more in _largest("ranks", _doubled(job.ranks, _MOST_RANKS), ranks, fits):
        yield f"{words} on {-(-more.ranks // hardware.ranks_per_node)} such machines", more
    halves = [n for n in _halved(job.seq_len, 128) if job.batch_tokens % n == 0]
    yield from _largest("train.seq_len", halves, lambda n: replace(job, seq_len=n), fits)
    layers = range(m.num_hidden_layers - 1, 0, -1)
    yield from _largest(
        "model.num_hidden_layers", layers, lambda n: model(num_hidden_layers=n), fits
    )
    experts = _halved(m.num_experts, max(2, m.num_experts_per_tok))
    experts = [n for n in experts if n % job.ep == 0]
    yield from _largest("model.num_experts", experts, lambda n: model(num_experts=n), fits)
    widths = _halved(m.moe_intermediate_size, 64)
    yield from _largest(
        "model.moe_intermediate_size", widths, lambda n: model(moe_intermediate_size=n), fits
    )


def _shrunk(job: Job) -> Iterator[tuple[str, Job]]:
    """Smaller and smaller models of the family: half of every size, then a quarter, and so on."""
    m = job.model
    while m.num_attention_heads % 2 == 0 and m.hidden_size % 8 == 0:
        m = replace(
            m,
            hidden_size=m.hidden_size // 2,
            num_attention_heads=m.num_attention_heads // 2,
            attention_projection_size=m.attention_projection_size // 2,
            moe_intermediate_size=max(1, m.moe_intermediate_size // 2),
            num_hidden_layers=max(1, m.num_hidden_layers // 2),
        )
        keys = [
            f"model.{key}={getattr(m, key)}"
            for key in m.__dataclass_fields__
            if getattr(m, key) != getattr(job.model, key)
        ]
        yield " ".join(keys), replace(job, model=m)


def _largest(
    key: str, values: Iterable[int], change: Callable[[int], Job], fits: Callable[[Job], bool]
) -> Iterator[tuple[str, Job]]:
    """The first value, in the order given, with which the job fits."""
    for value in values:
        if fits(changed := change(value)):
            yield f"{key}={value}", changed
            return


def _fits_on(hardware: Hardware) -> Callable[[Job], bool]:
    def fits(job: Job) -> bool:
        return price(job, hardware).memory.fits

    return fits


def _larger_machine(words: str, job: Job, hardware: Hardware) -> Change | None:
    """Every tier that is too small as large as it must be, in whole GiB; None: none is."""
    tiers = {t.name: -(-t.needed_bytes // GIB) * GIB for t in _whole(job, hardware).tiers}
    main = "gpu" if job.device == "cuda" else "cpu"
    larger = replace(
        hardware,
        rank_bytes=max(hardware.rank_bytes, tiers[main]),
        why="as wished",
        host_bytes=max(hardware.host_bytes, tiers["cpu"]) if main == "gpu" else 0,
        ssd_bytes=max(hardware.ssd_bytes, tiers.get("ssd", 0)),
    )
    job = replace(job, cpu_bytes=None, gpu_bytes=None, ssd_bytes=None)
    needed = " and ".join(
        f"{format_bytes(size)} of {name}"
        for name, size, there in (
            ("RAM" if main == "cpu" else "GPU memory", larger.rank_bytes, hardware.rank_bytes),
            ("RAM", larger.host_bytes, hardware.host_bytes),
            ("disk", larger.ssd_bytes, hardware.ssd_bytes),
        )
        if size > there
    )
    if not needed:
        return None
    words = f"{words} on a machine with {needed} for each rank".strip()
    return Change(words.removeprefix("on "), plan_of(job, larger))


def _whole(job: Job, hardware: Hardware) -> Memory:
    """The job's memory where budgets of the recipe do not bind."""
    return price(replace(job, cpu_bytes=None, gpu_bytes=None, ssd_bytes=None), hardware).memory


def _halved(value: int, least: int) -> list[int]:
    found = []
    while value % 2 == 0 and value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def _doubled(value: int, most: int) -> list[int]:
    found = []
    while value * 2 <= most:
        value *= 2
        found.append(value)
    return found
