"""The `adapter` section of a recipe: what is trained beside frozen weights."""

from __future__ import annotations

from ptm.common.config import Choice, config, ranged
from ptm.common.errors import RecipeError, line


class AdapterKind(Choice):
    none = "none"
    lora = "lora"


ROLES = ("q", "k", "v", "o", "experts", "lfa")


@config
class AdapterConfig:
    kind: AdapterKind = AdapterKind.none
    "none trains all weights; lora trains low-rank changes of frozen ones."
    targets: tuple[str, ...] = ("q", "k", "v", "o")
    """Roles of the matrices that are changed: q, k, v, o, experts, lfa. M32's q_proj and k_proj
    hold queries and keys of half the heads each, so these are roles, not names of modules."""
    rank: int = ranged(8, least=1, most=4096)
    "Rank of each change."
    alpha: float = ranged(16.0, above=0.0)
    "Changes are multiplied with alpha / rank."

    def check(self) -> None:
        unknown = [role for role in self.targets if role not in ROLES]
        if unknown or not self.targets:
            remedy = f"choose of {', '.join(ROLES)}"
            raise RecipeError(line("adapter.targets", self.targets, "must name roles", remedy))


ALL_WEIGHTS = AdapterConfig()
"No adapter."
