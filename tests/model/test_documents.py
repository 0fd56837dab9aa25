"""Packed documents and padding: nothing leaks, and packing changes no number (T10)."""

import pytest
import torch

from ptm.model.context import make_context
from tests.support.compare import distance
from tests.support.tiny import documents, packed, tiny_config, tiny_model

LENGTHS = [(40, 23, 1, 8), (1, 1, 30, 40), (72,), (24, 24, 24)]


def rows(seed: int = 0):
    return [documents(*lengths, seed=seed + i) for i, lengths in enumerate(LENGTHS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changed", [0, 1])
def test_one_document_changes_nothing_in_another(changed, dtype):
    model = tiny_model(dtype=dtype)
    batch = packed(rows())
    is_changed = batch.document_ids == changed
    other = torch.where(is_changed, packed(rows(seed=50)).input_ids, batch.input_ids)
    with torch.no_grad():
        before = model(batch.input_ids, document_ids_BL=batch.document_ids)
        after = model(other, document_ids_BL=batch.document_ids)
    assert (before - after)[is_changed].abs().max() > 0.1
    assert torch.equal(before[~is_changed], after[~is_changed])


def test_packed_or_alone_is_the_same_loss_and_gradient():
    model = tiny_model().train()
    batch = packed(rows())
    total = model.loss(batch)
    total.nll_sum.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    alone = [model.loss(packed([[document]])) for row in rows() for document in row]
    torch.stack([loss.nll_sum for loss in alone]).sum().backward()
    assert sum(int(loss.tokens) for loss in alone) == int(total.tokens) == batch.input_ids.numel()
    nll = sum(loss.nll_sum for loss in alone)
    assert abs(nll - total.nll_sum) / total.tokens <= 1e-5
    for name, parameter in model.named_parameters():
        assert distance(together[name], parameter.grad) <= 1e-5, name


def test_packed_or_alone_is_the_same_loss_token_by_token():
    model = tiny_model()
    batch = packed(rows())
    with torch.no_grad():
        logits = model(batch.input_ids, document_ids_BL=batch.document_ids)
        alone = [torch.cat([model(d[None, :-1])[0] for d in row]) for row in rows()]
    for logits_LV, alone_LV, labels in zip(logits, alone, batch.labels):
        nll = torch.nn.functional.cross_entropy(logits_LV, labels, reduction="none")
        expected = torch.nn.functional.cross_entropy(alone_LV, labels, reduction="none")
        assert (nll - expected).abs().max() <= 1e-5


def test_without_isolation_only_positions_start_again():
    model = tiny_model(isolate_documents=False)
    batch = packed(rows())
    with torch.no_grad():
        found = model(batch.input_ids, document_ids_BL=batch.document_ids)
        expected = model(batch.input_ids, position_ids_BL=batch.position_ids)
        plain = model(batch.input_ids)
    assert torch.equal(found, expected)
    assert (found - plain)[0].abs().max() > 0.1  # positions matter once documents see each other
    assert torch.equal(found[2], plain[2])  # a row of one document


def test_one_document_a_row_needs_no_mask():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    context = make_context(tiny_config(), ids, document_ids_BL=ids + torch.tensor([[3], [7]]))
    assert context.see_BLS is None and context.connected_BL is None


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, isolate):
    model = tiny_model(isolate_documents=isolate)
    longest = 20
    lengths = (20, 13, 1)
    ids = torch.full((3, longest), 7)
    mask = torch.zeros(3, longest, dtype=torch.int64)
    places = [slice(longest - n, None) if side == "left" else slice(n) for n in lengths]
    alone = [d[None, :-1] for d in documents(*lengths)]
    for row, place in enumerate(places):
        ids[row, place], mask[row, place] = alone[row][0], 1
    with torch.no_grad():
        logits = model(ids, attention_mask_BL=mask)
        for row, place in enumerate(places):
            assert distance(logits[row, place], model(alone[row])[0]) <= 1e-5
    assert torch.isfinite(logits).all()


def test_filler_is_not_counted():
    model = tiny_model().train()
    batch = packed(rows())
    filler = batch.document_ids.masked_fill(batch.document_ids == 1, -1)
    filler[2] = -1
    model.hidden(batch.input_ids, document_ids_BL=filler)
    counts = model.take_expert_counts()
    assert counts.sum(1).tolist() == [2 * int((filler >= 0).sum())] * 2
    model.hidden(batch.input_ids[:2], document_ids_BL=batch.document_ids[:2])
    assert model.take_expert_counts().sum() == 2 * 2 * batch.input_ids[:2].numel()
    assert model.take_expert_counts().sum() == 0
