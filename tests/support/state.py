"""A small training state for checkpoint tests: experts, uneven rows, masters and moments."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ptm.checkpoint.safetensors_file import as_bytes
from ptm.engine.state import stored_shape

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


class FileRows:
    """Rows that live in a file of their own, as those of an engine with a disk do."""

    def __init__(self, file: Path, shape: tuple[int, ...], first_row: int, num_rows: int) -> None:
        self.file, self.shape, self.first_row, self.num_rows = file, shape, first_row, num_rows
        self.dtype = torch.float32
        self.reads = 0

    def read(self) -> Tensor:
        self.reads += 1
        rows = torch.empty((self.num_rows, *self.shape[1:]), dtype=self.dtype)
        as_bytes(rows)[:] = self.file.read_bytes()
        return rows

    def write(self, rows: Tensor) -> None:
        assert (rows.shape, rows.dtype) == ((self.num_rows, *self.shape[1:]), self.dtype)
        self.file.write_bytes(as_bytes(rows))


BIAS = "model.router_bias"


def paged(
    values: dict[str, Tensor], folder: Path, *, rank: int, world: int, seed: int = 0
) -> dict[str, FileRows]:
    """A rank's part of `values`, cut as the paged engine cuts: end to end, then in ragged ranges.

    Stacked matrices are stored below each other, most ranks have no row of most tensors, and rank 0
    alone has BIAS. `seed` picks the cuts.
    """
    shapes = {name: stored_shape(tensor.shape) for name, tensor in values.items()}
    names = sorted(shapes)
    total = sum(math.prod(shapes[name]) for name in names)
    rng = random.Random(seed)
    cuts = [0, *sorted(rng.randrange(total + 1) for _ in range(world - 1)), total]
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, FileRows] = {}
    start = 0
    for name in names:
        shape = shapes[name]
        numel = math.prod(shape[1:])
        first, last = (
            min(max(0, -(-(cut - start) // numel)), shape[0]) for cut in cuts[rank : rank + 2]
        )
        if name == BIAS:
            first, last = (0, shape[0]) if rank == 0 else (shape[0], shape[0])
        found[name] = FileRows(folder / f"{name}.{rank}", shape, first, last - first)
        found[name].write(values[name].reshape(shape)[first:last])
        start += math.prod(shape)
    return found
