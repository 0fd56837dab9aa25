"""One rank of a contestant of ptm/bench/interleave.py: builds an engine, waits for its turns, and
writes what each cost.

    python -m ptm.bench.contestant FOLDER       started by torchrun, once per rank

Turn 0 is building and warming up. Batches are random tokens, the same for every engine: rows by
step, cut over ranks and micro-batches as the loader cuts them.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptm.bench import peers
from ptm.bench.interleave import POLL_S
from ptm.bench.layer import Layer
from ptm.build import make_plan
from ptm.common import env
from ptm.data.pack import Batch, pack
from ptm.engine.config import EngineKind
from ptm.kernels.shm import make_port
from ptm.mesh.mesh import Mesh, open_mesh
from ptm.mesh.peers import Peers
from ptm.model.config import ModelConfig
from ptm.model.init import new_weight
from ptm.model.transformer import Transformer
from ptm.parallel import deepspeed
from ptm.parallel.adapters import adapted_engine
from ptm.parts import DTYPES, build_model
from ptm.recipe import Recipe, load_recipe
from ptm.trainer.config import Recompute
from ptm.trainer.objectives import pretrain
from ptm.trainer.step import Engine, train_step


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    rank = env.ranks().rank
    recipe = load_recipe(job["words"])
    try:
        wait_for(folder / "go-0")
        mesh = open_mesh(recipe.engine.timeout_s, recipe.engine.ep, make_port)
        is_profiled = job["options"].pop("is_profiled", False)
        if job["peer"] == "experts":
            runner = Runner(recipe, mesh, Layer(recipe, mesh, **job["options"]), "experts")
        elif job["peer"] is not None:
            runner = Runner(recipe, mesh, peers.make_peer(job["peer"], recipe, mesh), job["peer"])
        else:
            runner = make_runner(recipe, mesh, job["options"], name=folder.name)
        warmed = runner.turn(job["warmup"])
        if is_profiled:
            profile = runner.profile()
            if rank == 0:
                write(folder / "profile.json", profile)
        write(folder / f"turn-0-{rank}.json", warmed)
        turn = 1
        while True:
            wait_for(folder / f"go-{turn}")
            write(folder / f"turn-{turn}-{rank}.json", runner.turn(job["steps"]))
            turn += 1
    except Exception as error:  # its last words are its result; the log has the trace
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]  # a table may follow
        write(
            folder / f"error-{rank}.json", {"error": text, "version": version(recipe, job["peer"])}
        )
        raise


def wait_for(file: Path) -> None:
    parent = os.getppid()
    while not file.exists():
        time.sleep(POLL_S)
        if os.getppid() != parent:
            os._exit(0)  # nobody is left to ask for a turn


def write(path: Path, values: dict[str, Any]) -> None:
    """At once: the parent may look at any time."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(values))
    beside.rename(path)


def version(recipe: Recipe, peer: str | None) -> str:
    name = f"torch {torch.__version__}"
    if peer is not None:
        name = f"{peers.version()}, {name}"
    if recipe.engine.kind is EngineKind.deepspeed or peer == "mixtral_moe":
        return f"deepspeed {deepspeed.version()}, {name}"
    return name


def make_runner(recipe: Recipe, mesh: Mesh, options: dict[str, Any], *, name: str) -> Runner:
    """The engine of `engine.kind` with new weights."""
    peers = Peers(mesh.background)
    engine: Engine
    if recipe.engine.kind is EngineKind.paged:
        plan = make_plan(recipe)
        _, engine = build_model(recipe, mesh, plan, peers, run_id=f"bench-{name}-{time.time()}")
    else:
        _, engine = adapted_engine(
            recipe.model,
            mesh=mesh,
            engine=recipe.engine,
            optim=recipe.optim,
            dtype=DTYPES[recipe.train.precision],
            clip=recipe.train.clip,
            recompute=recipe.train.recompute is Recompute.block,
            **options,
        )
    for parameter, shape in engine.shapes().items():
        value = new_weight(recipe.model, parameter, torch.Size(shape), recipe.train.seed)
        engine.fill(parameter, value)
    engine.publish()
    return Runner(recipe, mesh, engine)


@dataclass
class Runner:
    recipe: Recipe
    mesh: Mesh
    engine: Engine | Layer
    peer: str | None = None
    step: int = 0

    def turn(self, steps: int) -> dict[str, Any]:
        """Run `steps` steps; what they cost this rank."""
        batches = [self.batches(self.step + i) for i in range(steps)]
        self.meet()
        forget_peak()
        cpu, wire, sent, bound = cpu_s(), loopback_bytes(), *self.ledger()
        report = self.engine.report()
        started = time.perf_counter()
        tokens, loss = 0, math.nan
        for micro_batches in batches:
            loss = self.train(micro_batches)
            tokens += sum(int(batch.loss_mask.sum()) for batch in micro_batches)
            self.step += 1
        self.engine.drain()
        self.meet()
        seconds = time.perf_counter() - started
        now = self.engine.report()
        return {
            "seconds": seconds,
            "cpu_s": cpu_s() - cpu,
            "tokens": tokens,
            "steps": steps,
            "loss": loss,
            "peak_bytes": peak_bytes(),
            "wire_bytes": loopback_bytes() - wire,
            "ledger_bytes": self.ledger()[0] - sent,
            "bound_bytes": self.ledger()[1] - bound,
            "least_bytes": self.least_bytes(steps, self.ledger()[1] - bound),
            "report": {key: value - report.get(key, 0.0) for key, value in now.items()},
            "version": version(self.recipe, self.peer),
        }

    def train(self, micro_batches: list[Batch]) -> float:
        """One step; its loss."""
        if isinstance(self.engine, Layer):
            return self.engine.train(len(micro_batches))
        outcome = train_step(
            self.engine,
            pretrain,
            micro_batches,
            lr=self.recipe.train.lr,
            flags=[],
            device=self.mesh.device,
        )
        if self.peer is None:
            self.engine.commit(self.step + 1, {})  # as in a run: nothing without a disk
        return outcome.loss

    def profile(self) -> dict[str, Any]:
        """One step under torch's profiler: its seconds, those of each op itself, and those in
        which this rank waited for others."""
        waited = self.mesh.ledger.seconds
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            seconds = self.turn(1)["seconds"]
        ops = {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}
        return {"seconds": seconds, "ops": ops, "waited_s": self.mesh.ledger.seconds - waited}

    def meet(self) -> None:
        if self.mesh.device.type != "cpu":
            torch.accelerator.synchronize()
        self.mesh.sum_counts(torch.zeros(1, device=self.mesh.device))

    def ledger(self) -> tuple[int, int]:
        entries = self.mesh.ledger.entries.values()
        return sum(e.sent_bytes for e in entries), sum(e.bound_bytes for e in entries)

    def batches(self, step: int) -> list[Batch]:
        train, config = self.recipe.train, self.recipe.model
        num_rows, mesh = train.batch_tokens // train.seq_len, self.mesh
        generator = torch.Generator().manual_seed(step)
        shape = (num_rows, train.seq_len + 1)
        tokens = torch.randint(config.vocab_size, shape, generator=generator).numpy()
        first, last = num_rows * mesh.rank // mesh.world, num_rows * (mesh.rank + 1) // mesh.world
        number = math.ceil(math.ceil(num_rows / mesh.world) / train.micro_batch_size)
        made = []
        for start in range(first, first + number * train.micro_batch_size, train.micro_batch_size):
            rows = tokens[start : max(start, min(start + train.micro_batch_size, last))]
            batch = pack(rows, eod_id=-1, isolate_documents=config.isolate_documents)
            made.append(Batch(*(column.to(mesh.device) for column in batch)))
        return made

    def least_bytes(self, steps: int, bound: int) -> int:
        """What all ranks must send in some steps at engine.zero; with experts over ranks, whose
        rows the router decides, what the ledger calls the least, on all ranks alike."""
        if self.recipe.engine.ep > 1:
            return bound * self.mesh.world
        train, world = self.recipe.train, self.mesh.world
        num_rows = train.batch_tokens // train.seq_len
        number = math.ceil(math.ceil(num_rows / world) / train.micro_batch_size)
        size = DTYPES[train.precision].itemsize
        return (
            steps
            * (world - 1)
            * size
            * elements(self.recipe.model, self.recipe.engine.zero, number)
        )


def elements(model: ModelConfig, zero: int, micro_batches: int) -> int:
    """Elements that must be gathered or summed in a step.

    zero=3, holding one block and the root (embedding, norm, head) at a time: in each micro-batch
    weights for forward and for backward, and gradients once; but the last block goes from forward
    to backward with nothing in between, and the first from there to the next forward, and the root
    stays. zero=2: weights once a step, gradients in each micro-batch. zero=1: both once.
    """
    whole = Transformer(model, device="meta")
    total = sum(param.numel() for param in whole.parameters())
    blocks = [sum(param.numel() for param in b.parameters()) for b in whole.model.layers]
    if zero in (0, 3):
        kept = total - sum(blocks) + blocks[0]  # from one micro-batch to the next
        return micro_batches * (2 * total + sum(blocks[:-1])) - (micro_batches - 1) * kept
    return (1 + (micro_batches if zero == 2 else 1)) * total


def cpu_s() -> float:
    return time.process_time()  # all threads


def loopback_bytes() -> int:
    """Bytes that the loopback device of this network namespace has carried."""
    for row in Path("/proc/self/net/dev").read_text().splitlines():
        name, colon, rest = row.partition(":")
        if colon and name.strip() == "lo":
            return int(rest.split()[0])
    return 0


def forget_peak() -> None:
    """Start the peak of resident memory anew, where the system lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # then it is the peak since the start of the process


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
