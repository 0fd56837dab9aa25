"""A small training state for checkpoint tests: experts, uneven rows, masters and moments."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.mlp.experts.w1": (5, 4, 6),
    "model.layers.0.mlp.experts.w2": (5, 6, 2),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.0.self_attn.lf_gate.conv1.bias": (1,),
    "model.norm.weight": (2,),
}
KINDS = ("model", "optim.exp_avg", "optim.exp_avg_sq")
NAMES = {f"{kind}.{name}" for kind in KINDS for name in SHAPES}


def whole(seed: int, scale: int = 1) -> dict[str, Tensor]:
    """The state as plain tensors, every value a function of (seed, name)."""
    found = {}
    for i, name in enumerate(sorted(NAMES)):
        shape = next(s for n, s in SHAPES.items() if name.endswith("." + n))
        generator = torch.Generator().manual_seed(1000 * seed + i)
        found[name] = torch.randn(shape[0], *(scale * d for d in shape[1:]), generator=generator)
    return found


def sharded(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as DTensors, Shard(0) over all ranks, cut as an engine cuts them."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = DeviceMesh("cpu", torch.arange(world))
    found = {}
    for name, tensor in values.items():
        rows = -(-len(tensor) // world)
        mine = tensor[min(rank * rows, len(tensor)) : (rank + 1) * rows].clone()
        found[name] = DTensor.from_local(
            mine, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return found


def empty(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors like `values`, full of NaN, to load into."""
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in values.items()}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_bitwise_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare this rank's rows of both, byte for byte."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        a, b = local(found[name]).contiguous(), local(tensor).contiguous()
        assert a.shape == b.shape and a.dtype == b.dtype, (name, a.shape, b.shape)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name} differs"
