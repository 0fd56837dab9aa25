"""Soft tokens: positions of a document like any other, and the only weights with a gradient."""

import pytest
import torch
from torch import Tensor

from ptm.data.pack import Batch, with_soft
from ptm.model.adapter import SOFT_TOKENS, add_adapter, first_ids
from ptm.model.lora_config import AdapterConfig, AdapterKind
from ptm.model.transformer import Transformer
from tests.support.tiny import documents, packed, tiny_model

COUNT = 3
PROMPT = AdapterConfig(kind=AdapterKind.prompt, prompt_tokens=COUNT)


def with_prompt(*words: int, **changes) -> Transformer:
    """A model whose soft tokens are random, or the embeddings of words."""
    model = tiny_model(**changes)
    add_adapter(model, PROMPT)
    soft = model.model.embed_tokens.soft_tokens
    assert soft is not None
    if words:
        soft.data = model.model.embed_tokens.weight.data[list(words)].clone()
    else:
        torch.nn.init.normal_(soft, generator=torch.Generator().manual_seed(4))
    return model


def test_embeddings_of_words_do_as_the_words_do_in_training_and_generation():
    words = [7, 70, 7]
    model, plain = with_prompt(*words), tiny_model()
    assert model.soft_ids == [-1, -2, -3] and plain.soft_ids == []
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(model(ids), plain(ids))  # without soft tokens it is the base
    soft, hard = (torch.tensor(2 * [one]) for one in (model.soft_ids, words))
    found, wanted = model(torch.cat([soft, ids], 1)), plain(torch.cat([hard, ids], 1))
    assert torch.equal(found, wanted) and not torch.equal(found[:, COUNT:], plain(ids))
    for use_cache in (True, False):
        more = {"temperature": 0.7, "seed": 5, "use_cache": use_cache}
        new = model.generate(torch.cat([soft, ids], 1), 6, **more)
        wanted = plain.generate(torch.cat([hard, ids], 1), 6, **more)
        assert torch.equal(new[:, COUNT:], wanted[:, COUNT:])


@pytest.mark.parametrize("isolate", [True, False])
def test_every_document_of_a_packed_row_begins_with_them(isolate: bool):
    rows = [documents(9, 14, 4), documents(20, 7, seed=1)]
    batch = Batch(*packed(rows))
    soft = with_soft(batch, COUNT)
    assert soft.input_ids.shape == (2, 27 + 3 * COUNT)
    assert int(soft.loss_mask.sum()) == int(batch.loss_mask.sum())
    model = with_prompt(isolate_documents=isolate)
    if not isolate:  # then documents see each other, soft tokens and all; only places are checked
        assert torch.isfinite(model.loss(soft).nll_sum)
    for b, row in enumerate(rows):
        for number, tokens in enumerate(row):
            here = soft.document_ids[b] == number
            wanted = [*model.soft_ids, *tokens[:-1].tolist()]
            assert soft.input_ids[b][here].tolist() == wanted
            assert soft.position_ids[b][here].tolist() == list(range(len(wanted)))
            counted = soft.loss_mask[b] & here
            assert torch.equal(soft.labels[b][counted], tokens[1:])
    if isolate:
        alone = [nll_alone(model, tokens) for row in rows for tokens in row]
        torch.testing.assert_close(model.loss(soft).nll_sum, torch.stack(alone).sum())


def nll_alone(model: Transformer, tokens: Tensor) -> Tensor:
    """Of a document in a row of its own."""
    soft = torch.tensor(model.soft_ids)
    logits = model(torch.cat([soft, tokens[:-1]])[None])[0, COUNT:]
    return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")


def test_gradients_reach_the_soft_tokens_and_nothing_else():
    model = with_prompt(dtype=torch.float64)
    batch = with_soft(Batch(*packed([documents(9, 6), documents(15, seed=1)])), COUNT)
    model.loss(batch).nll_sum.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {SOFT_TOKENS}
    soft = model.model.embed_tokens.soft_tokens
    assert soft is not None and soft.grad is not None
    at, eps, values = (2, 5), 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            soft[at] += sign * eps
            values.append(model.loss(batch).nll_sum)
            soft[at] -= sign * eps
    wanted = (values[0] - values[1]) / (2 * eps)
    torch.testing.assert_close(soft.grad[at], wanted, rtol=1e-5, atol=1e-7)


def test_a_batch_without_soft_tokens_has_a_gradient_of_zero():
    model = with_prompt()
    model.loss(Batch(*packed([documents(9, 6)]))).nll_sum.backward()
    soft = model.model.embed_tokens.soft_tokens
    assert soft is not None and soft.grad is not None and not soft.grad.any()


def test_they_begin_as_words_of_a_text_or_of_a_seed():
    def ids(text: str | None, seed: int = 0, count: int = 5) -> list[int]:
        config = AdapterConfig(kind=AdapterKind.prompt, prompt_tokens=count, prompt_text=text)
        return first_ids(config, vocab_size=96, seed=seed, encode=lambda t: list(map(int, t)))

    assert ids("12") == [1, 2, 1, 2, 1] and ids("123", count=2) == [1, 2]
    drawn = ids(None, count=50)
    assert drawn == ids(None, count=50) != ids(None, seed=1, count=50)
    assert max(drawn) < 96 and min(drawn) >= 0 and len(set(drawn)) > 20
