"""Generation: run the prompt, pick a token, run that, until every row has ended.

Rows are independent: each draws from numbers of its own, a function of its seed; neither padding
nor the other rows of the batch reach it. So a batch gives what its rows give one by one, up to
rounding, and the same batch gives the same bits wherever it runs.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.common.errors import RecipeError, line

if TYPE_CHECKING:
    from ptm.model.cache import Cache
    from ptm.model.transformer import Transformer

logger = logging.getLogger(__name__)


class Picked(NamedTuple):
    """One more id of each row, and its log-probability at the temperature, before top_p: (B,)
    each. Rows that have ended go on with `eos_id`."""

    ids_B: Tensor
    log_probs_B: Tensor


def alone(is_going_on: bool) -> bool:
    """Asks nobody: what a generation that no other rank takes part in does."""
    return is_going_on


def steps(
    model: Transformer,
    input_ids_BL: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    *,
    eos_id: int | None = None,
    attention_mask: Tensor | None = None,
    seed: int | Sequence[int] = 0,
    use_cache: bool = True,
    agree: Callable[[bool], bool] = alone,
) -> Iterator[Picked]:
    """The next id of every row, again and again, until all have ended.

    Temperature 0 takes the likeliest token. Rows shorter than the longest are padded on either
    side, with attention_mask (B, L) 0 there. seed: one for each row, or one they are made from.
    Without the cache every step runs the whole rows again, for comparison. agree: called with
    whether this rank goes on, says whether any does; ranks that share weights must run as many
    forwards. Raises RecipeError, before the first step.
    """
    _check("max_new_tokens", max_new_tokens, "must be at least 0", max_new_tokens >= 0)
    _check("temperature", temperature, "must be finite and at least 0", 0 <= temperature < math.inf)
    _check("top_p", top_p, "must be above 0 and at most 1", 0 < top_p <= 1)
    model.check_ids(input_ids_BL)
    _warn_of_length(model, input_ids_BL.shape[1], max_new_tokens)
    num_rows = len(input_ids_BL)
    seeds = [row_seed(seed, i) for i in range(num_rows)] if isinstance(seed, int) else seed
    assert len(seeds) == num_rows, f"{len(seeds)} seeds for {num_rows} rows"

    def run() -> Iterator[Picked]:
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        cache = model.new_cache() if use_cache else None
        ids_BL, mask_BL = input_ids_BL, attention_mask
        if mask_BL is not None:
            ids_BL, mask_BL = left_padded(ids_BL, mask_BL)
        ended_B = torch.zeros_like(ids_BL[:, 0], dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits_BV = _next_logits(model, ids_BL, mask_BL, cache)
            draws = [torch.rand((), generator=g, dtype=torch.float64) for g in generators]
            draws_B = torch.stack(draws) if draws else torch.zeros(0, dtype=torch.float64)
            token_B = pick(logits_BV, temperature=temperature, top_p=top_p, draws_B=draws_B)
            log_prob_B = _log_probs(logits_BV, token_B, temperature)
            if eos_id is not None:
                token_B = token_B.masked_fill(ended_B, eos_id)
                ended_B = ended_B | (token_B == eos_id)
            yield Picked(token_B, log_prob_B)
            if eos_id is not None and not agree(not bool(ended_B.all())):
                return
            if cache is not None:
                ids_BL, mask_BL = token_B[:, None], None
            else:
                ids_BL = torch.cat([ids_BL, token_B[:, None]], dim=1)
                mask_BL = None if mask_BL is None else F.pad(mask_BL, (0, 1), value=1)

    return run()


def _warn_of_length(model: Transformer, prompt: int, new: int) -> None:
    """Rotary positions have no end, but those behind the longest row of training are strange to the
    model."""
    longest = model.config.max_position_embeddings
    if prompt + new - 1 > longest:  # the last token is not run
        rule = (
            f"behind a prompt of {prompt} tokens they may pass max_position_embeddings={longest}, "
            "the longest text that the model was made for"
        )
        logger.warning(line("max_new_tokens", new, rule, "shorten them, or expect worse text"))


def row_seed(*parts: object) -> int:
    """A seed that is a function of its parts, and of nothing else."""
    text = " ".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def left_padded(ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's padding (mask 0) in front of its tokens, which keep their order."""
    order_BL = (mask_BL != 0).long().argsort(dim=1, stable=True)
    return ids_BL.gather(1, order_BL), mask_BL.gather(1, order_BL)


@contextmanager
def recorded_routes(model: Transformer) -> Iterator[list[list[Tensor]]]:
    """The experts of every token that runs meanwhile: per layer, (tokens, A) ids per forward."""
    found: list[list[Tensor]] = [[] for _ in model.model.layers]
    handles = []
    for block, ids in zip(model.model.layers, found):
        keep = _keeper(ids)
        handles.append(block.mlp.gate.register_forward_hook(keep))  # type: ignore[union-attr]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keeper(ids: list[Tensor]):
    return lambda gate, args, routing: ids.append(routing.ids_TA)


def _check(key: str, value: float, rule: str, is_good: bool) -> None:
    if not is_good:
        raise RecipeError(line(key, value, rule, "change it"))


def pick(logits_BV: Tensor, *, temperature: float, top_p: float, draws_B: Tensor) -> Tensor:
    """Choose an id per row: the likeliest, or the one where the cumulative distribution passes the
    row's draw in [0, 1), over the smallest set of ids that holds `top_p` of the mass.

    Draws are looked up on the CPU, so that a seed means the same on every device.
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    p_BV = (logits_BV.float().cpu() / temperature).softmax(-1).double()
    order_BV = None
    if top_p < 1.0:
        p_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = p_BV.cumsum(-1) - p_BV  # nothing before the likeliest, so one always stays
        p_BV = p_BV.masked_fill(before_BV >= top_p, 0.0)
    upto_BV = p_BV.cumsum(-1)
    place_B1 = torch.searchsorted(upto_BV, draws_B[:, None] * upto_BV[:, -1:], right=True)
    place_B1 = place_B1.clamp(max=p_BV.shape[1] - 1)
    drawn_B1 = place_B1 if order_BV is None else order_BV.gather(1, place_B1)
    return drawn_B1.squeeze(1).to(logits_BV.device)


def _log_probs(logits_BV: Tensor, ids_B: Tensor, temperature: float) -> Tensor:
    z_BV = logits_BV.float() / (temperature or 1.0)
    return z_BV.gather(1, ids_B[:, None]).squeeze(1) - z_BV.logsumexp(-1)


@torch.no_grad()
def _next_logits(
    model: Transformer, ids_BL: Tensor, mask_BL: Tensor | None, cache: Cache | None
) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        return model.next_logits(ids_BL, cache, mask_BL)
    finally:
        model.train(was_training)
