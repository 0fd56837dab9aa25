"""What `import ptm` promises: two functions, and a model that is called and generates."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ptm

GOLDEN = Path(__file__).parent / "golden" / "m32_a"


def test_load_recipe_takes_a_list_of_words() -> None:
    recipe = ptm.load_recipe(["recipe=m32", "model.scale=mini", "train.lr=3e-4"])
    assert recipe.train.lr == 3e-4 and recipe.model.num_experts == 32


@pytest.mark.parametrize(
    ("rope", "file"),
    [
        ("hf_bf16", "expected"),
        ("megatron", "expected_rope_megatron"),
        ("fp32", "expected_rope_fp32"),
    ],
)
def test_a_published_folder_is_a_callable_model(rope: str, file: str) -> None:
    model = ptm.load_model(GOLDEN, rope=rope, dtype=torch.float32)
    inputs, expected = (
        load_file(GOLDEN / "inputs.safetensors"),
        load_file(GOLDEN / f"{file}.safetensors"),
    )
    with torch.no_grad():
        logits = model(inputs["input_ids"])
    assert logits.shape == (2, 33, 512)
    assert float((logits - expected["logits"]).abs().max()) < 1e-4
    tokens = model.generate(inputs["input_ids"], 16, temperature=0, top_p=1.0)
    assert torch.equal(tokens[:, :33], inputs["input_ids"])
    assert torch.equal(tokens[:, 33:], expected["greedy_tokens"])


def test_megatron_is_the_default_for_published_weights() -> None:
    inputs = load_file(GOLDEN / "inputs.safetensors")["input_ids"]
    with torch.no_grad():
        assert torch.equal(
            ptm.load_model(str(GOLDEN))(inputs), ptm.load_model(GOLDEN, "megatron")(inputs)
        )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="load_modle"):
        ptm.load_modle  # noqa: B018
