"""Soft tokens against PEFT's prompt tuning of the same model."""

import pytest
import torch
from torch import nn

from ptm.data.pack import Batch, with_soft
from ptm.model.adapter import add_adapter
from ptm.model.lora_config import AdapterConfig, AdapterKind
from ptm.model.transformer import Transformer
from tests.support.adapters import AsPublished
from tests.support.tiny import documents, packed, tiny_model

pytestmark = pytest.mark.slow  # importing peft takes ten seconds

COUNT = 5
PROMPT = AdapterConfig(kind=AdapterKind.prompt, prompt_tokens=COUNT)


def with_values() -> Transformer:
    model = tiny_model()
    add_adapter(model, PROMPT)
    values = torch.randn(COUNT, 32, generator=torch.Generator().manual_seed(8))
    model.get_parameter("model.embed_tokens.soft_tokens").data = values
    return model


def test_logits_loss_and_gradient_are_those_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `peers`)")
    transformers = pytest.importorskip("transformers")
    ours = with_values()
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=COUNT, prompt_tuning_init="RANDOM"
    )
    theirs = peft.get_peft_model(AsPublished(tiny_model(), transformers), config)
    soft = ours.get_parameter("model.embed_tokens.soft_tokens")
    (trained,) = (p for p in theirs.parameters() if p.requires_grad)
    assert trained.shape == soft.shape
    trained.data = soft.data.clone()

    rows = [documents(9, 14), documents(17, 6, seed=1)]
    loss = ours.loss(with_soft(Batch(*packed(rows)), COUNT))  # ours are packed, theirs one by one
    wanted_loss = torch.zeros(())
    for tokens in (tokens for row in rows for tokens in row):
        ids = tokens[None, :-1]
        logits = ours(torch.cat([torch.tensor([ours.soft_ids]), ids], dim=1))
        wanted = theirs(input_ids=ids).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
        assert float((wanted[:, COUNT:] - ours(ids)).detach().abs().max()) > 1e-2
        wanted_loss = wanted_loss + nn.functional.cross_entropy(
            wanted[0, COUNT:], tokens[1:], reduction="sum"
        )
    torch.testing.assert_close(loss.nll_sum, wanted_loss, rtol=1e-5, atol=1e-5)
    (loss.nll_sum / loss.tokens).backward()
    (wanted_loss / loss.tokens).backward()
    assert soft.grad is not None and trained.grad is not None and float(soft.grad.norm()) > 1e-3
    error = float((soft.grad - trained.grad).norm() / trained.grad.norm())
    assert error <= 1e-5, error
    torch.testing.assert_close(soft.grad, trained.grad, rtol=1e-5, atol=1e-5)
