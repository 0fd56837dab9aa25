"""The `adapter` section of a recipe: what is trained beside frozen weights."""

from __future__ import annotations

from ptm.common.config import Choice, config, ranged
from ptm.common.errors import RecipeError, line


class AdapterKind(Choice):
    none = "none"
    lora = "lora"
    prompt = "prompt"


ROLES = ("q", "k", "v", "o", "experts", "lfa")


@config
class AdapterConfig:
    kind: AdapterKind = AdapterKind.none
    """none trains all weights; lora trains low-rank changes of frozen ones; prompt trains soft
    tokens before each document, embeddings that are those of no word."""
    targets: tuple[str, ...] = ("q", "k", "v", "o")
    """Roles of the matrices that are changed: q, k, v, o, experts, lfa. M32's q_proj and k_proj
    hold queries and keys of half the heads each, so these are roles, not names of modules."""
    rank: int = ranged(8, least=1, most=4096)
    "Rank of each change."
    alpha: float = ranged(16.0, above=0.0)
    "Changes are multiplied with alpha / rank."
    prompt_tokens: int = ranged(20, least=1, most=4096)
    "Soft tokens before each document, for kind=prompt; they take places of train.seq_len."
    prompt_text: str | None = None
    """Text whose tokens' embeddings the soft tokens begin as, repeated or cut to their number; null
    draws words of the vocabulary by train.seed."""

    def check(self) -> None:
        unknown = [role for role in self.targets if role not in ROLES]
        if unknown or not self.targets:
            remedy = f"choose of {', '.join(ROLES)}"
            raise RecipeError(line("adapter.targets", self.targets, "must name roles", remedy))


ALL_WEIGHTS = AdapterConfig()
"No adapter."
