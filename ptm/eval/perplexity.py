"""Loss, perplexity and bits per byte on held-out text.

Bits per byte divides by the bytes of text that the predicted tokens stand for, so models with
different tokenizers can be compared; end-of-document tokens stand for none. Rows are shared out
over the ranks, sums are in fp64, so the result does not depend on the number of ranks beyond
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ptm.mesh.mesh import Mesh


@torch.no_grad()
def held_out(
    model: nn.Module, batches: Iterable[Any], *, token_bytes: Tensor, mesh: Mesh
) -> dict[str, float]:
    """Evaluate this rank's batches and sum over ranks.

    token_bytes (V,) int64: bytes of text of each id, 0 for specials. Returns eval_loss (nats a
    token), eval_perplexity, eval_bits_per_byte and eval_tokens. The model's mode and expert
    counters are left as they were.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    for batch in batches:
        loss = model.loss(batch)  # type: ignore[operator]
        labels = batch.labels[batch.loss_mask]
        sums += torch.stack(
            [loss.nll_sum.double(), loss.tokens.double(), token_bytes[labels].sum().double()]
        )
    model.take_expert_counts()  # type: ignore[operator]
    model.train(was_training)
    nll, tokens, num_bytes = mesh.sum_counts(sums).tolist()
    mean = nll / max(tokens, 1)
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(min(mean, 700.0)),
        "eval_bits_per_byte": nll / math.log(2) / max(num_bytes, 1),
        "eval_tokens": tokens,
    }
