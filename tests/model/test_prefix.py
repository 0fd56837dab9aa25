"""A prefix of keys and values that every position sees: against attention with a longer history."""

import pytest
import torch
from torch import Tensor

from ptm.kernels import native
from ptm.kernels.attention import attention_reference
from ptm.kernels.prefix import prefix_attention
from ptm.model.adapter import add_adapter
from ptm.model.lora_config import AdapterConfig, AdapterKind
from ptm.model.transformer import Transformer
from tests.support.native import each_isa, error, poisoned, same_bits
from tests.support.tiny import documents, packed, tiny_model

PREFIX = AdapterConfig(kind=AdapterKind.prefix, prompt_tokens=5)


def inputs(B: int, H: int, L: int, K: int, P: int, kind: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(L)
    shapes = [(B, H, L, K)] * 3 + [(P, H * K)] * 2
    return [torch.randn(s, generator=generator).to(kind).requires_grad_() for s in shapes]


def mask_of(B: int, L: int) -> Tensor:
    """Two documents a row."""
    number = (torch.arange(L)[None] >= torch.arange(1, B + 1)[:, None] * L // (B + 1)).long()
    return (number[:, :, None] == number[:, None]) & torch.ones(L, L, dtype=torch.bool).tril()


def definition(q, k, v, keys, values, mask):
    B, H, L, K = q.shape
    near = [x.view(-1, H, K).transpose(0, 1).expand(B, -1, -1, -1) for x in (keys, values)]
    mask = torch.ones(1, L, L, dtype=torch.bool).tril() if mask is None else mask
    seen = torch.cat([torch.ones(len(mask), L, len(keys), dtype=torch.bool), mask], 2)
    return attention_reference(q, torch.cat([near[0], k], 2), torch.cat([near[1], v], 2), seen)


def both(function, tensors: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    out = function(*tensors, mask)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, grad)]


@each_isa
@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 40, 32, 5), (1, 3, 130, 64, 1), (3, 1, 1, 32, 20)])
def test_value_and_gradients_in_bf16(isa, shape, is_masked):
    tensors = inputs(*shape, torch.bfloat16)
    mask = mask_of(shape[0], shape[2]) if is_masked else None
    exact = both(definition, [t.detach().double().requires_grad_() for t in tensors], mask)
    with native.forced(isa), poisoned():
        found = both(prefix_attention, tensors, mask)
        same_bits(lambda: both(prefix_attention, tensors, mask))
    for f, e in zip(found, exact, strict=True):
        assert error(f, e) < 8e-3, (isa, shape)


def test_value_and_gradients_in_fp32():
    tensors = inputs(2, 2, 24, 16, 4, torch.float32)
    for mask in (None, mask_of(2, 24)):
        exact = both(definition, [t.detach().double().requires_grad_() for t in tensors], mask)
        for f, e in zip(both(prefix_attention, tensors, mask), exact, strict=True):
            assert error(f, e) < 1e-6


def with_prefix(**changes) -> Transformer:
    model = tiny_model(**changes)
    add_adapter(model, PREFIX)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            torch.nn.init.normal_(parameter, generator=generator)
    return model


def test_only_the_prefix_is_trained_and_packed_documents_are_as_alone():
    model = with_prefix(isolate_documents=True)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = model.config.num_hidden_layers
    assert len(names) == 2 * layers and all(".self_attn.prefix_" in name for name in names)
    rows = documents(9, 14)
    whole = model.loss(packed([rows]))
    alone = sum(float(model.loss(packed([[one]])).nll_sum.detach()) for one in rows)
    assert float(whole.nll_sum.detach()) == pytest.approx(alone, rel=1e-6)
    whole.total.backward()
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert has_gradient == (name in names), name
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids), tiny_model(isolate_documents=True)(ids))


def test_generation_with_and_without_a_cache_is_the_same():
    model = with_prefix().eval()
    ids = torch.arange(24).view(2, 12)
    found = [model.generate(ids, 8, use_cache=use) for use in (True, False)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], tiny_model().eval().generate(ids, 8))
