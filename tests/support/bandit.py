"""A task for GRPO that is one token long: prompts of no meaning, a reward for the first token."""

from types import SimpleNamespace
from typing import Any

from ptm.data.preferences import Prompt, Sides
from ptm.data.rewards import Scored
from ptm.mesh.mesh import Mesh
from ptm.model.transformer import Transformer
from ptm.policies import Rollouts
from ptm.recipe import Recipe, load_recipe
from ptm.trainer.signals import StopRequest
from tests.support.tiny import tiny_model

EOD, TOKEN = 0, 5
PROMPTS = [Prompt("", str(n), "", [1 + n % 7, 2, 3][: 1 + n % 3]) for n in range(12)]


class Payer:
    """A reward of 1 where the first token is TOKEN, or where it is another."""

    def __init__(self, is_wanted: bool) -> None:
        self.is_wanted = is_wanted

    def score(self, rows: list[tuple[str, str, str]], is_stopped: object = None) -> Scored:
        found = [(text.split()[:1] == [str(TOKEN)]) == self.is_wanted for *_, text in rows]
        return Scored([float(one) for one in found], raised=0, hung=0)


def policy(seed: int) -> Transformer:
    """Of 8 tokens, all about as likely."""
    changes = {"vocab_size": 8, "num_experts": 4, "num_hidden_layers": 1}
    return tiny_model(seed, initializer_range=0.1, **changes)


def recipe_of(seed: int, *, kl_coef: float = 0.0) -> Recipe:
    """8 groups of 8 answers a step, 4 groups a micro-batch."""
    values = {
        "recipe": "m32_grpo",
        "model.scale": "debug",
        "train.seq_len": 16,
        "train.batch_tokens": 16 * 64,
        "train.micro_batch_size": 32,
        "train.seed": seed,
        "grpo.max_new_tokens": 4,
        "grpo.kl_coef": kl_coef,
    }
    return load_recipe([f"{key}={value}" for key, value in values.items()])


def rollouts_of(
    recipe: Recipe,
    mesh: Mesh,
    model: Transformer,
    *,
    is_wanted: bool = True,
    reference: Transformer | None = None,
    rewarder: Any = None,
    stop: StopRequest | None = None,
) -> Rollouts:
    tokenizer = SimpleNamespace(eod_id=EOD, decode=lambda ids: " ".join(map(str, ids)))
    return Rollouts(
        recipe,
        mesh,
        model,
        Sides(PROMPTS, PROMPTS * 5),
        tokenizer=tokenizer,
        rewarder=rewarder or Payer(is_wanted),
        reference=reference,
        stop=stop,
    )
