"""What a recipe names outside of itself, looked for before a run folder is made (ptm/build.py)."""

from __future__ import annotations

from pathlib import Path

from ptm.checkpoint.expert_rows import refuse_other_codes
from ptm.data.rewards import Rewarder
from ptm.data.sft import chat_template
from ptm.data.sft_config import TASK_SOURCE
from ptm.data.source import refuse_missing
from ptm.data.tokenizer import load_tokenizer
from ptm.quant.grid import GridKind
from ptm.recipe import Recipe
from ptm.trainer.config import ObjectiveKind
from ptm.tuning import base_tokenizer, tokenizer_folder


def sources(recipe: Recipe) -> tuple[str, ...]:
    """Where the rows of the recipe's mode are."""
    found = {
        ObjectiveKind.pretrain: recipe.data.source,
        ObjectiveKind.sft: recipe.sft.source,
        ObjectiveKind.dpo: (recipe.dpo.source,),
        ObjectiveKind.grpo: (recipe.grpo.source,),
    }
    return found[recipe.mode]


def refuse_absent(recipe: Recipe) -> None:
    """Raise a PtmError where data, the base, the chat template or the reward is not there, or where
    template or reward cannot be compiled. What is in the data is read later."""
    data = base_tokenizer(recipe)
    for source in data.source:
        refuse_missing(source)
    if recipe.adapter.has_codes:
        assert recipe.train.init_from is not None
        refuse_other_codes(Path(recipe.train.init_from), GridKind(recipe.adapter.base))
    if recipe.mode is ObjectiveKind.pretrain:
        return
    for source in sources(recipe):
        if source != TASK_SOURCE:
            refuse_missing(source, f"{recipe.mode}.source")
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
        chat_template(recipe.sft, tokenizer, tokenizer_folder(recipe.train.init_from)).close()
    if recipe.mode is ObjectiveKind.grpo:
        Rewarder(recipe.grpo.reward, timeout_s=recipe.grpo.reward_timeout_s).close()
