"""Generation: run the prompt, pick a token, run that, until every row has ended."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.common.errors import RecipeError, line

if TYPE_CHECKING:
    from ptm.model.cache import Cache
    from ptm.model.transformer import Transformer


def stream(
    model: Transformer,
    input_ids_BL: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    *,
    eos_id: int | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield one (B,) tensor of new ids after another; a row that has ended goes on with `eos_id`.

    Temperature 0 takes the likeliest token. Rows shorter than the longest are padded on the left,
    with attention_mask (B, L) 0 there. Random numbers come from a generator of this call's own.
    Without the cache every step runs the whole rows again, for comparison. Raises RecipeError.
    """
    _check("max_new_tokens", max_new_tokens, "must be at least 0", max_new_tokens >= 0)
    _check("temperature", temperature, "must be finite and at least 0", 0 <= temperature < math.inf)
    _check("top_p", top_p, "must be above 0 and at most 1", 0 < top_p <= 1)
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache() if use_cache else None
    ids_BL, mask_BL = input_ids_BL, attention_mask
    ended_B = torch.zeros_like(ids_BL[:, 0], dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits_BV = _next_logits(model, ids_BL, mask_BL, cache)
        token_B = pick(logits_BV, temperature=temperature, top_p=top_p, generator=generator)
        if eos_id is not None:
            token_B = token_B.masked_fill(ended_B, eos_id)
            ended_B = ended_B | (token_B == eos_id)
        yield token_B
        if eos_id is not None and bool(ended_B.all()):
            return
        if cache is not None:
            ids_BL, mask_BL = token_B[:, None], None
        else:
            ids_BL = torch.cat([ids_BL, token_B[:, None]], dim=1)
            mask_BL = None if mask_BL is None else F.pad(mask_BL, (0, 1), value=1)


def _check(key: str, value: float, rule: str, is_good: bool) -> None:
    if not is_good:
        raise RecipeError(line(key, value, rule, "change it"))


def pick(
    logits_BV: Tensor, *, temperature: float, top_p: float, generator: torch.Generator
) -> Tensor:
    """Choose an id per row: the likeliest, or a draw from the smallest set of ids that holds
    `top_p` of the mass.

    Draws are made on the CPU in fp32, so that a seed means the same on every device.
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    p_BV = (logits_BV.float().cpu() / temperature).softmax(-1)
    p_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = (
        p_BV.cumsum(-1) - p_BV
    )  # the likeliest id has nothing before it, so one always stays
    p_BV = p_BV.masked_fill(before_BV >= top_p, 0.0) if top_p < 1.0 else p_BV
    drawn_B1 = torch.multinomial(p_BV, 1, generator=generator)
    return order_BV.gather(1, drawn_B1).squeeze(1).to(logits_BV.device)


@torch.no_grad()
def _next_logits(
    model: Transformer, ids_BL: Tensor, mask_BL: Tensor | None, cache: Cache | None
) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        x_BLD = model.hidden(ids_BL, attention_mask_BL=mask_BL, cache=cache)
    finally:
        model.train(was_training)
    return F.linear(x_BLD[:, -1], model.head_weight)
