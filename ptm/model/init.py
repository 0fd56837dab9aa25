"""New weights as the published training made them (Megatron's): every tensor a pure function
of seed and name.

    matrices                        N(0, initializer_range)
    o_proj, experts.w2              N(0, initializer_range / sqrt(2 x layers)): they write into
                                    the residual stream
    norms                           1
    convolutions and their biases   U(-1/sqrt(fan_in), 1/sqrt(fan_in))

Numbers are drawn on the CPU in fp32 from a generator of the tensor's own, so they do not depend on
the order of tensors, the number of ranks, the device or the type the model runs in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ptm.model.config import ModelConfig


def new_weight(config: ModelConfig, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The initial value of the parameter `name`, whole, fp32, on the CPU."""
    weight = torch.empty(tuple(shape), dtype=torch.float32)
    if "norm" in name.split(".")[-2] and ".lora_" not in name:
        return weight.fill_(1.0)
    generator = torch.Generator().manual_seed(_seed_of(seed, name))
    if ".lora_" in name:  # as PEFT begins: a change of nothing
        if name.endswith("_B"):
            return weight.zero_()
        bound = 1.0 / math.sqrt(weight.shape[-1])
        return weight.uniform_(-bound, bound, generator=generator)
    if ".lf_gate.conv" in name:
        # Both convolutions see two positions; the bias shares its weight's range.
        fan_in = 2 * config.hidden_size if ".conv1." in name else config.hidden_size
        bound = 1.0 / math.sqrt(fan_in)
        return weight.uniform_(-bound, bound, generator=generator)
    std = config.initializer_range
    if name.endswith((".o_proj.weight", ".experts.w2")):
        std /= math.sqrt(2 * config.num_hidden_layers)
    return weight.normal_(0.0, std, generator=generator)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
