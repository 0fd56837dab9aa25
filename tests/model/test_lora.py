"""LoRA by role: which rows change, its gradients, and a merged model."""

import pytest
import torch

from ptm.model.init import new_weight
from ptm.model.lora import add_lora, changed, names_of, places, use_lora
from ptm.model.lora_config import ROLES, AdapterConfig, AdapterKind
from tests.support.tiny import tiny_model

LORA = AdapterConfig(kind=AdapterKind.lora, targets=ROLES, rank=3, alpha=6.0)


def with_lora(config: AdapterConfig = LORA, *, dtype: torch.dtype = torch.float32):
    model = tiny_model(dtype=dtype)
    add_lora(model, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) * 0.1
    return model


def test_a_new_adapter_changes_nothing():
    plain, model = tiny_model(), tiny_model()
    add_lora(model, LORA)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = new_weight(model.config, name, parameter.shape, 1)
    use_lora(model, LORA)
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), plain(ids))
    assert sum(p.requires_grad for p in model.parameters()) == 2 * sum(
        1 for _ in places(model, ROLES)
    )


@pytest.mark.parametrize("role", ROLES)
def test_each_role_changes_its_rows_only_and_a_merged_model_has_the_same_bits(role: str):
    config = AdapterConfig(kind=AdapterKind.lora, targets=(role,), rank=3, alpha=6.0)
    model, merged = with_lora(config), tiny_model()
    at = dict(zip((m for m in model.modules()), (m for m in merged.modules())))
    K = model.model.layers[0].self_attn.head_dim
    for _, module, attribute in places(model, (role,)):
        a, b = (getattr(module, name) for name in names_of(role, attribute))
        weight = getattr(module, attribute)
        new = changed(weight, a, b, role=role, scale=2.0, head_dim=K).detach()
        wanted = torch.zeros_like(weight, dtype=torch.float64)  # written out by hand
        change = 2.0 * torch.einsum("...or,...ri->...oi", b.double(), a.double())
        if role in ("q", "k"):
            for head in range(weight.shape[0] // (2 * K)):
                start = 2 * K * head + (K if role == "k" else 0)
                wanted[start : start + K] = change[head * K : head * K + K]
        else:
            wanted = change.view_as(weight)
        torch.testing.assert_close((new - weight).double(), wanted, rtol=1e-4, atol=1e-6)
        getattr(at[module], attribute).data = new
    use_lora(model, config)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(model(ids), merged(ids))


def test_gradients_reach_the_adapter_and_nothing_else():
    model = with_lora(dtype=torch.float64)
    use_lora(model, LORA)
    ids = torch.arange(24).view(2, 12)
    model(ids).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
    name, parameter = next(
        (n, p) for n, p in model.named_parameters() if n.endswith("q_proj.lora_k_B")
    )
    at, eps = (1, 2), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[at] += sign * eps
            values.append(model(ids).square().sum())
            parameter[at] -= sign * eps
    assert parameter.grad is not None
    torch.testing.assert_close(
        (values[0] - values[1]) / (2 * eps), parameter.grad[at], rtol=1e-4, atol=1e-6
    )
