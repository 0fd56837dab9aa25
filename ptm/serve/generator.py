"""Text from a model: encode a prompt, decode tokens one by one, and never print half a character.

A byte-level token may end inside a UTF-8 character; such bytes wait for the next token. The model
and the tokenizer are duck-typed, so this works with what `load_model` returns and with the model of
a running trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. temperature 0 is greedy."""

    prompt: str = ""
    ids: tuple[int, ...] = ()
    "Tokens to continue in place of the prompt's own, as a chat template's; the prompt is shown."
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def stream_text(model: Any, tokenizer: Any, sampling: Sampling) -> Iterator[str]:
    """The prompt, then the continuation piece by piece, up to the end of the document."""
    was_training = model.training
    model.eval()
    ids = sampling.ids or tokenizer.encode(sampling.prompt) or [tokenizer.eod_id]
    ids = [*model.soft_ids, *ids]
    device = next(model.parameters()).device
    tokens = model.stream(  # what it refuses or warns of comes before the prompt
        torch.tensor([ids], device=device),
        sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        eos_id=tokenizer.eod_id,
    )
    yield sampling.prompt
    new: list[int] = []
    shown = 0
    with torch.no_grad():
        for token in tokens:
            if int(token) == tokenizer.eod_id:
                break
            new.append(int(token))
            text = tokenizer.decode(new)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[shown:]
                shown = len(text)
    yield tokenizer.decode(new)[shown:] if new else ""
    model.train(was_training)
