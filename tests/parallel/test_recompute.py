"""Recomputation changes no bit, saves memory, counts nothing twice and cannot route anew."""

import pytest
import torch

from ptm.kernels import native
from ptm.model import router
from ptm.model.config import RouterKind
from ptm.parallel.recompute import recompute_blocks
from tests.support.tiny import documents, packed, tiny_model


def loss_and_gradients(model, batch):
    model.train()
    loss = model.loss(batch)
    loss.nll_sum.backward()
    return [loss.nll_sum.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("kind", RouterKind, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_and_counts(dtype, kind):
    batch = packed([documents(40, 24), documents(64, seed=1)])
    plain, again = (tiny_model(dtype=dtype, router=kind) for _ in range(2))
    recompute_blocks(again.model.layers)
    assert list(dict(again.named_parameters())) == list(dict(plain.named_parameters()))
    for a, b in zip(loss_and_gradients(plain, batch), loss_and_gradients(again, batch)):
        assert torch.equal(a, b)
    assert torch.equal(plain.take_expert_counts(), again.take_expert_counts())


def test_same_bits_with_dropout():
    batch = packed([documents(64)])
    results = []
    for recompute in (False, True):
        model = tiny_model(attention_dropout=0.3)
        if recompute:
            recompute_blocks(model.model.layers)
        torch.manual_seed(0)
        results.append(loss_and_gradients(model, batch))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_keeps_less():
    batch = packed([documents(64)])
    kept_bytes = []
    for recompute in (False, True):
        model = tiny_model().train()
        if recompute:
            recompute_blocks(model.model.layers)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def pack(t, kept=kept, parameters=parameters):
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.hidden(batch.input_ids)
        kept_bytes.append(sum(kept.values()))
    assert kept_bytes[1] < kept_bytes[0] / 4


@pytest.mark.parametrize("isa", [None, *native.machine()])
def test_a_second_forward_cannot_route_anew(monkeypatch, isa):
    """Give the second forward other scores, as other arithmetic would: same experts."""
    batch, chosen = packed([documents(64)]), []

    def noisy(qkv, *args):
        seen = attention_router(qkv + torch.randn(qkv.shape, generator=generator), *args)
        chosen.append(seen.ids_TA)
        return seen

    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    attention_router = router.attention_router
    recompute_blocks(model.model.layers)
    monkeypatch.setattr(router, "attention_router", noisy)
    with native.forced(isa):
        loss_and_gradients(model, batch)
    first, second = chosen[:2], chosen[2:][::-1]  # the backward visits layers last to first
    assert len(first) == len(second) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_generation_is_left_alone():
    ids = torch.arange(12)[None]
    plain, again = tiny_model(), tiny_model()
    recompute_blocks(again.model.layers)
    assert torch.equal(plain.generate(ids, 5), again.train().generate(ids, 5))
