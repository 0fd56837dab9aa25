"""The `adapter` section of a recipe: what is trained beside frozen weights."""

from __future__ import annotations

from ptm.common.config import Choice, config, ranged
from ptm.common.errors import RecipeError, line


class AdapterKind(Choice):
    none = "none"
    lora = "lora"
    prompt = "prompt"
    prefix = "prefix"


class Base(Choice):
    """How frozen experts are held."""

    plain = "plain"
    int4 = "int4"
    int8 = "int8"
    fp6_e3m2 = "fp6_e3m2"
    fp6_e2m3 = "fp6_e2m3"


ROLES = ("q", "k", "v", "o", "experts", "lfa")


@config
class AdapterConfig:
    kind: AdapterKind = AdapterKind.none
    """none trains all weights; lora trains low-rank changes of frozen ones; prompt trains soft
    tokens before each document, embeddings that are those of no word; prefix trains keys and values
    of each layer that every position sees."""
    targets: tuple[str, ...] = ("q", "k", "v", "o")
    """Roles of the matrices that are changed: q, k, v, o, experts, lfa. M32's q_proj and k_proj
    hold queries and keys of half the heads each, so these are roles, not names of modules."""
    rank: int = ranged(8, least=1, most=4096)
    "Rank of each change."
    alpha: float = ranged(16.0, above=0.0)
    "Changes are multiplied with alpha / rank."
    prompt_tokens: int = ranged(20, least=1, most=4096)
    """Soft tokens before each document, for kind=prompt, where they take places of train.seq_len;
    keys and values of a layer, for kind=prefix."""
    prompt_text: str | None = None
    """Text whose tokens' embeddings the soft tokens begin as, repeated or cut to their number; null
    draws words of the vocabulary by train.seed."""

    base: Base = Base.plain
    """How the frozen experts are held. plain: as weights; int4, int8, fp6_e3m2, fp6_e2m3: as codes
    of the export that train.init_from names (QLoRA), which become weights a block at a time."""

    def check(self) -> None:
        unknown = [role for role in self.targets if role not in ROLES]
        if unknown or not self.targets:
            remedy = f"choose of {', '.join(ROLES)}"
            rule = f"{unknown[0]!r} is no role" if unknown else "must name roles"
            raise RecipeError(line("adapter.targets", self.targets, rule, remedy))
        if self.has_codes and self.kind is AdapterKind.none:
            rule = "needs frozen weights, and all are trained"
            raise RecipeError(line("adapter.base", self.base, rule, "set adapter.kind=lora"))

    @property
    def has_codes(self) -> bool:
        """Whether frozen experts are held as codes."""
        return self.base is not Base.plain


ALL_WEIGHTS = AdapterConfig()
"No adapter."
