"""Low-rank changes against PEFT's layers: the same A, B and alpha on the same weights of M32."""

import pytest
import torch
from torch import Tensor, nn

from ptm.model.lora import PREFIX, add_lora, names_of, places, use_lora
from ptm.model.lora_config import ROLES, AdapterConfig, AdapterKind
from tests.support.tiny import documents, packed, tiny_model

pytestmark = pytest.mark.slow  # importing peft takes ten seconds

RANK, ALPHA = 3, 7.0
TARGETS = {
    "q": ["q_proj", "k_proj"],
    "k": ["q_proj", "k_proj"],
    "v": ["v_proj"],
    "o": ["o_proj"],
    "lfa": ["conv1", "conv2"],
}


def with_values(role: str) -> nn.Module:
    """M32 with numbers in A and B."""
    model = tiny_model(initializer_range=0.1)
    add_lora(model, AdapterConfig(kind=AdapterKind.lora, targets=(role,), rank=RANK, alpha=ALPHA))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if PREFIX in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


class Layout:
    """One matrix's A and B as PEFT keeps them, and PEFT's gradients as we keep ours.

    PEFT has no change of some rows only: B is widened by rows of zeros. A convolution's A is a
    convolution. Experts' A and B are matrices: (E r, in), and (out, r E) with experts innermost.
    """

    def __init__(self, role: str, a: Tensor, b: Tensor, head_dim: int) -> None:
        self.role, self.a, self.b, self.head_dim = role, a, b, head_dim

    def to_peft(self) -> tuple[Tensor, Tensor]:
        a, b = self.a.detach(), self.b.detach()
        if self.role == "experts":
            return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        if self.role == "lfa":
            return a.view(RANK, -1, 2, 1), b[:, :, None, None]
        if self.role in ("q", "k"):
            wide = torch.zeros(b.shape[0] // self.head_dim, 2, self.head_dim, RANK)
            wide[:, self.half] = b.view(-1, self.head_dim, RANK)
            return a, wide.view(-1, RANK)
        return a, b

    def to_ours(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.role == "experts":
            E = len(self.a)
            return a.view(E, RANK, -1), b.view(len(b), RANK, E).permute(2, 0, 1)
        if self.role in ("q", "k"):
            b = b.view(-1, 2, self.head_dim, RANK)[:, self.half].reshape(-1, RANK)
        return a.reshape(self.a.shape), b.reshape(self.b.shape)

    @property
    def half(self) -> int:
        return ("q", "k").index(self.role)


@pytest.mark.parametrize("role", ROLES)
def test_loss_logits_and_gradients_are_those_of_peft(role: str):
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `peers`)")
    ours = with_values(role)
    head_dim = ours.model.layers[0].self_attn.head_dim
    names = {module: name for name, module in ours.named_modules()}
    layouts = {}
    for _, module, attribute in places(ours, (role,)):
        a, b = (getattr(module, name) for name in names_of(role, attribute))
        layouts[names[module], attribute] = Layout(role, a, b, head_dim)

    theirs = tiny_model(initializer_range=0.1)
    theirs.load_state_dict({n: t for n, t in ours.state_dict().items() if PREFIX not in n})
    parameters = [".".join(place) for place in layouts] if role == "experts" else None
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=TARGETS.get(role, []),
        target_parameters=parameters,
    )
    theirs = peft.inject_adapter_in_model(config, theirs)
    changed = {}
    for place, layout in layouts.items():
        layer = layer_of(theirs, *place)
        made = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for parameter, values in zip(made, layout.to_peft()):
            assert parameter.shape == values.shape
            parameter.data = values.clone()
        changed[place] = made

    if role == "lfa":  # the filter reads its convolutions' weights, which PEFT changes in forward
        read_changed_weights(theirs)
    config = AdapterConfig(kind=AdapterKind.lora, targets=(role,), rank=RANK, alpha=ALPHA)
    use_lora(ours, config)
    batch = packed([documents(9, 14), documents(17, 6, seed=1)])
    plain = tiny_model(initializer_range=0.1)(batch.input_ids)
    logits, wanted = ours(batch.input_ids), theirs(batch.input_ids)
    assert float((wanted - plain).detach().abs().max()) > 1e-2  # the change has a part
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    losses = [model.loss(batch).total / batch.loss_mask.sum() for model in (ours, theirs)]
    assert abs(float(losses[0].detach()) - float(losses[1].detach())) <= 1e-5
    for loss in losses:
        loss.backward()
    for place, layout in layouts.items():
        grads = layout.to_ours(*(p.grad for p in changed[place]))
        for mine, grad in zip((layout.a.grad, layout.b.grad), grads):
            assert mine is not None and float(mine.norm()) > 1e-6
            torch.testing.assert_close(mine, grad, rtol=1e-5, atol=1e-5)
            assert float((mine - grad).norm() / grad.norm()) <= 1e-5, place


def layer_of(model: nn.Module, name: str, attribute: str) -> nn.Module:
    """PEFT's layer around a module, or around one parameter of it: those are nested."""
    layer = model.get_submodule(name)
    while getattr(layer, "parameter_name", attribute) != attribute:
        layer = layer.base_layer
    return layer


def read_changed_weights(model: nn.Module) -> None:
    """Replace PEFT's convolutions by ones with the weight plus PEFT's change."""
    for block in model.model.layers:
        for name in ("conv1", "conv2"):
            layer = block.self_attn.lf_gate.get_submodule(name)
            weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
            setattr(block.self_attn.lf_gate, name, Weight(weight, layer.get_base_layer().bias))


class Weight(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
