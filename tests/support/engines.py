"""What every engine must come to: training of the tiny model on one process with torch's AdamW, the
whole batch at once, and the same rows cut over ranks and micro-batches for an engine."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from ptm.mesh.mesh import Mesh
from ptm.model.init import new_weight
from ptm.model.transformer import Transformer
from ptm.optim.adamw import adamw
from ptm.optim.config import OptimConfig
from tests.support.tiny import Batch, documents, packed, tiny_config

ROWS, LENGTH, LR = 6, 24, 3e-3
UPDATE = functools.partial(adamw, config=OptimConfig())


def tiny(**changes: Any) -> Any:
    sizes = {"num_experts": 4, "initializer_range": 0.2, "tie_word_embeddings": False}
    return tiny_config(**{**sizes, **changes})


def rows_of_step(step: int) -> Batch:
    rows = []
    for i in range(ROWS):
        cut = 5 + (7 * i + step) % (LENGTH - 6)
        rows.append(documents(cut, LENGTH - cut, seed=100 * step + i))
    return packed(rows)


def take(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(*(column[start:stop] for column in batch))


def micro_batches(step: int, mesh: Mesh, size: int) -> list[Batch]:
    """As the loader cuts them: as many on each rank, the last may have no row."""
    first, last = ROWS * mesh.rank // mesh.world, ROWS * (mesh.rank + 1) // mesh.world
    number = math.ceil(math.ceil(ROWS / mesh.world) / size)
    starts = [first + i * size for i in range(number)]
    whole = rows_of_step(step)
    return [take(whole, s, max(s, min(s + size, last))) for s in starts]


def reference(steps: int, *, clip: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Losses, norms and last weights of plain training."""
    model = Transformer(tiny(**changes))
    model.init_weights(0)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(steps):
        loss = model.loss(rows_of_step(step))
        mean = loss.nll_sum / loss.tokens
        mean.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)))
        losses.append(float(mean.detach()))
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: param.detach().numpy() for name, param in model.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


@torch.no_grad()
def fill(engine: Any, config: Any, seed: int = 0) -> None:
    """Write new weights into the masters, row by row, and zeros into the moments."""
    shapes = {n: p.shape for n, p in Transformer(config, device="meta").named_parameters()}
    for name, rows in engine.state().items():
        kind, _, parameter = name.partition(".")
        if kind != "model":
            rows.write(torch.zeros(rows.num_rows, *rows.shape[1:]))
            continue
        value = new_weight(config, parameter, shapes[parameter], seed).reshape(rows.shape)
        rows.write(value[rows.first_row : rows.first_row + rows.num_rows])
    engine.publish()


def step_of(engine: Any, batches: list[Batch], *, lr: float = LR, poison: float = 0.0) -> Any:
    nll_sum, tokens = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    engine.model.train()
    for i, batch in enumerate(batches):
        loss = engine.model.loss(batch)
        scaled = loss.nll_sum * poison if poison else loss.nll_sum
        engine.backward(scaled, is_last=i == len(batches) - 1)
        nll_sum += loss.nll_sum.detach()
        tokens += loss.tokens
    return engine.step(nll_sum=nll_sum, tokens=tokens, lr=lr, flags=[1.0])


def state_of(engine: Any) -> dict[str, tuple[tuple[int, ...], int, np.ndarray]]:
    """This rank's rows by name, as things that travel between processes."""
    return {
        name: (tuple(rows.shape), rows.first_row, rows.read().clone().numpy())
        for name, rows in engine.state().items()
    }


def joined(states: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Whole tensors from the rows of all ranks; every row exactly once."""
    whole = {}
    for name, (shape, _, _) in states[0].items():
        out, seen = np.zeros(shape, np.float32), np.zeros(shape[0], int)
        for state in states:
            _, first, rows = state[name]
            out[first : first + len(rows)] = rows
            seen[first : first + len(rows)] += 1
        assert (seen == 1).all(), name
        whole[name] = out
    return whole
