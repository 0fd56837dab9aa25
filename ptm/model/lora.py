"""LoRA by role: weights in use are W + alpha / rank x B A, with W frozen.

    role      matrices                                      A            B
    v, o      v_proj, o_proj                                (r, in)      (out, r)
    q, k      the rows of q_proj and of k_proj that hold    (r, in)      (out / 2, r)
              queries, or keys, of their half of the heads
    experts   w1 and w2, each expert its own                (E, r, in)   (E, out, r)
    lfa       both convolutions, as matrices (out, 2 in)    (r, 2 in)    (out, r)

The change is added to the weight, not to its product: one mechanism for linears, convolutions and
expert tensors, under any dispatcher, and a merged model computes the same bits. It costs the
gradient of one weight at a time, which autograd frees; no sum, page or moment is kept for it.

`add_lora` gives a model the parameters, before an engine takes them; `use_lora`, after it, makes
modules read their weight so. Source: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ptm.model.attention import Attention
from ptm.model.lora_config import AdapterConfig
from ptm.model.moe import MixtureOfExperts

PREFIX = "lora_"


def places(model: nn.Module, targets: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, str]]:
    """(role, module, its weight's attribute) of every matrix that is changed."""
    for module in model.modules():
        if isinstance(module, Attention):
            for role in ("q", "k"):
                if role in targets:
                    yield role, module.q_proj, "weight"
                    yield role, module.k_proj, "weight"
            for role, linear in (("v", module.v_proj), ("o", module.o_proj)):
                if role in targets:
                    yield role, linear, "weight"
            if "lfa" in targets:
                yield "lfa", module.lf_gate.conv1, "weight"
                yield "lfa", module.lf_gate.conv2, "weight"
        elif isinstance(module, MixtureOfExperts) and "experts" in targets:
            yield "experts", module.experts, "w1"
            yield "experts", module.experts, "w2"


def names_of(role: str, attribute: str) -> tuple[str, str]:
    """Attributes of A and B in their module."""
    stem = f"{PREFIX}{role}_{attribute}_" if role == "experts" else f"{PREFIX}{role}_"
    return stem + "A", stem + "B"


def add_lora(model: nn.Module, config: AdapterConfig) -> None:
    """Freeze every parameter, and register A and B without values."""
    model.requires_grad_(False)
    for role, module, attribute in list(places(model, config.targets)):
        weight = getattr(module, attribute)
        lead = weight.shape[:1] if weight.dim() == 3 else ()
        out, width = (
            (weight.shape[1], weight.shape[2]) if lead else (weight.shape[0], weight[0].numel())
        )
        out = out // 2 if role in ("q", "k") else out
        for name, shape in zip(
            names_of(role, attribute), ((config.rank, width), (out, config.rank))
        ):
            made = torch.empty((*lead, *shape), dtype=weight.dtype, device=weight.device)
            setattr(module, name, nn.Parameter(made))


def use_lora(model: nn.Module, config: AdapterConfig) -> None:
    """Have every changed module read its weight with the change."""
    scale = config.alpha / config.rank
    heads = {
        linear: module.head_dim
        for module in model.modules()
        if isinstance(module, Attention)
        for linear in (module.q_proj, module.k_proj)
    }
    found: dict[nn.Module, dict[str, list[str]]] = {}
    for role, module, attribute in places(model, config.targets):
        found.setdefault(module, {}).setdefault(attribute, []).append(role)
    for module, attributes in found.items():
        module._lora = (scale, heads.get(module, 0))  # type: ignore[assignment]
        read = {name: _reader(name, tuple(roles)) for name, roles in attributes.items()}
        module.__class__ = type("Lora" + type(module).__name__, (type(module),), read)


def _reader(attribute: str, roles: tuple[str, ...]) -> property:
    def read(module: Any) -> Tensor:
        scale, head_dim = module._lora
        weight = module._parameters[attribute]
        for role in roles:
            a, b = (module._parameters[name] for name in names_of(role, attribute))
            weight = changed(weight, a, b, role=role, scale=scale, head_dim=head_dim)
        return weight

    return property(read)


def changed(
    weight: Tensor, a: Tensor, b: Tensor, *, role: str, scale: float, head_dim: int
) -> Tensor:
    """weight + scale x b a, in the weight's type, on the rows of the role."""
    change = torch.matmul(b, a) * scale
    if role not in ("q", "k"):
        return weight + change.view_as(weight)
    at = ("q", "k").index(role)
    rows = weight.view(-1, 2, head_dim, weight.shape[1])
    both = [rows[:, 0], rows[:, 1]]
    both[at] = both[at] + change.view_as(both[at])
    return torch.stack(both, dim=1).view_as(weight)
