"""Sizes and costs by closed form, and the rules between keys."""

import pytest

from ptm.common.errors import RecipeError
from ptm.model.config import (
    ModelConfig,
    RouterKind,
    active_parameters,
    flops_per_token,
    forward_flops_per_token,
    num_parameters,
)


def test_the_published_model_has_40b_weights_of_which_3_7b_are_active():
    config = ModelConfig()
    assert num_parameters(config) == 39_942_842_368
    assert num_parameters(ModelConfig(tie_word_embeddings=False)) == 40_219_404_288
    assert active_parameters(config) == 3_704_055_808


def test_flops_follow_the_published_numbers():
    config = ModelConfig()
    assert forward_flops_per_token(config, 0) == pytest.approx(7.41e9, rel=1e-3)
    assert forward_flops_per_token(config, 4096) - forward_flops_per_token(
        config, 0
    ) == pytest.approx(0.81e9, rel=1e-2)
    assert flops_per_token(config, 0) == pytest.approx(22.2e9, rel=2e-3)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"hidden_size": 2050}, r"model\.hidden_size=2050: .*model\.num_attention_heads=16"),
        (
            {"num_attention_heads": 3, "hidden_size": 6},
            r"model\.attention_projection_size=4096: .*heads=3",
        ),
        (
            {"attention_projection_size": 1024},
            r"model\.attention_projection_size=1024: .*model\.hidden_size=2048",
        ),
        (
            {"num_experts_per_tok": 33},
            r"model\.num_experts_per_tok=33: must be at most model\.num_experts=32",
        ),
        (
            {"router": RouterKind.shared_expert, "num_experts_per_tok": 1},
            r"model\.num_experts_per_tok=1: .*shared",
        ),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
    ids=str,
)
def test_numbers_that_cannot_go_together_are_refused(numbers, message):
    with pytest.raises(RecipeError, match=message):
        ModelConfig(**numbers)
