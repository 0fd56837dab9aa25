"""Exact answers: greedy continuations of prompts, compared with the one right answer.

Every rank answers a part of the questions, in as many forwards as every other: weights may be
sharded, so ranks go in step, and no batch stops early.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptm.mesh.mesh import Mesh


@torch.no_grad()
def answer(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new: int, pad_id: int, batch: int = 32
) -> list[list[int]]:
    """`max_new` greedy tokens after each prompt."""
    device = next(model.parameters()).device
    found: list[list[int]] = []
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        longest = max(map(len, some))
        ids = torch.full((len(some), longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(some):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        new = list(model.stream(ids.to(device), max_new, attention_mask=mask.to(device)))
        found += torch.stack(new, dim=1).tolist()
    return found


def exact_answers(
    model: Any,
    questions: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_new: int,
    eod_id: int,
    mesh: Mesh,
) -> float:
    """Share of (prompt, right answer with its end) whose greedy continuation begins with it."""
    if not questions:
        return 0.0
    per_rank = -(-len(questions) // mesh.world)
    mine = [i for i in range(len(questions)) if i // per_rank == mesh.rank]
    padded = [*mine, *[0] * (per_rank - len(mine))]  # as many forwards on every rank
    prompts = [questions[i][0] for i in padded]
    new = answer(model, prompts, max_new=max_new, pad_id=eod_id)
    right = [list(questions[i][1]) == new[at][: len(questions[i][1])] for at, i in enumerate(mine)]
    total: Tensor = mesh.sum_counts(
        torch.tensor([float(sum(right))], dtype=torch.float64, device=mesh.device)
    )
    return float(total) / len(questions)
