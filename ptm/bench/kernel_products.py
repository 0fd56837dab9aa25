"""Cases of `ptm bench kernels` for products: with quantized weights, and the head with its loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.bench.kernel_case import Case, Run, ours, with_isa
from ptm.kernels.loss import linear_cross_entropy
from ptm.kernels.quant_linear import PackedWeight, pack, stack, wq_linear, wq_moe
from ptm.quant.grid import Grid, GridKind, Quantized, round_to_nearest

OUTPUTS, INPUTS = 8192, 2048
COLD_BYTES = 400e6  # weights that take turns, so that none is still in a cache
EXPERTS, WIDTH, HIDDEN = 64, 1024, 4096
HEADS = [(2048, 256, 8192), (1024, 2048, 16384)]  # T, D, V: of the mini model, and a large one
GRIDS = (Grid(GridKind.int4), Grid(GridKind.fp6_e2m3), Grid(GridKind.int8, 0))


def wq_linear_cases() -> Iterator[Case]:
    """A linear of the published size: one row, whose time is that of reading weights, and 512."""
    w_NK = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
    for grid in GRIDS:
        q = round_to_nearest(w_NK, grid)
        plain = _cold([q.dequantize().bfloat16()], OUTPUTS * INPUTS * 2)
        packed = _packed(q)
        weights = [packed, *(_copy(packed) for _ in range(int(COLD_BYTES / packed.size_bytes)))]
        exact = q.dequantize().double().t()
        for rows in (1, 16, 512):
            x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1)).bfloat16()
            turn, other = cycle(weights), cycle(plain)
            runs = ours("wq_linear", lambda x=x, turn=turn: [wq_linear(x, next(turn))])
            runs.pop("ptm, torch")  # the reference unpacks weights in each call
            runs["torch, bf16 weights"] = lambda x=x, other=other: [F.linear(x, next(other))]
            if grid.kind is GridKind.int4:
                runs["torch, int4 weights"] = _torch_int4(x, q)
            flops = 2.0 * rows * OUTPUTS * INPUTS
            what = f"{rows} x {INPUTS} -> {OUTPUTS}, {grid.kind} group {grid.group}"
            moved = packed.size_bytes + 2 * rows * (INPUTS + OUTPUTS)
            yield Case("wq_linear", what, runs, lambda x=x, w=exact: [x.double() @ w], moved,
                       flops if rows > 16 else 0.0)  # fmt: skip


def wq_moe_cases() -> Iterator[Case]:
    """Routed experts, 2 active: one row reads two whole. All have the same weights, and calls take
    the next ones in turn, so that none is still in a cache."""
    draw = torch.Generator().manual_seed(0)
    shapes = (2 * HIDDEN, WIDTH), (WIDTH, HIDDEN)
    ws = [torch.randn(*shape, generator=draw) * shape[1] ** -0.5 for shape in shapes]
    for grid in GRIDS[:2]:
        found = [round_to_nearest(w, grid) for w in ws]
        packed = [stack([_packed(q)] * EXPERTS) for q in found]
        plain = [torch.stack([q.dequantize().bfloat16()] * EXPERTS) for q in found]
        exact = [q.dequantize().double().expand(EXPERTS, -1, -1) for q in found]
        for rows in (1, 16, 512):
            yield _wq_moe_case(rows, grid, draw, packed, plain, exact)


def _wq_moe_case(
    rows: int,
    grid: Grid,
    draw: torch.Generator,
    packed: list[PackedWeight],
    plain: list[Tensor],
    exact: list[Tensor],
) -> Case:
    x, weights = torch.randn(rows, WIDTH, generator=draw), torch.rand(rows, 2, generator=draw)
    rows_bf16, routes = x.bfloat16(), _routes(rows)
    turn, other = cycle(routes), cycle(routes)
    runs = ours("wq_moe", lambda: [wq_moe(rows_bf16, next(turn), weights, *packed)])
    runs.pop("ptm, torch")
    runs["torch, bf16 weights"] = lambda: [_experts(rows_bf16, next(other), weights, *plain)]
    what = (
        f"{rows} x {WIDTH}, {EXPERTS} experts of {HIDDEN}, 2 active, {grid.kind} group {grid.group}"
    )
    return Case(
        "wq_moe",
        what,
        runs,
        lambda: [_experts(rows_bf16.double(), routes[0], weights.double(), *exact)],
        bytes=min(EXPERTS, 2 * rows) * sum(w.size_bytes for w in packed) / EXPERTS,
        flops=12.0 * rows * WIDTH * HIDDEN if rows > 16 else 0.0,
    )


def _packed(q: Quantized) -> PackedWeight:
    values = None if q.grid.is_int else q.grid.values()
    return pack(q.codes_NK, q.scale_NG, bits=q.grid.bits, group=q.grid.group, values=values)


def _routes(rows: int) -> list[Tensor]:
    """ids (rows, 2) of calls, whose experts follow one another."""
    first = torch.arange(rows)[:, None] * 2 + torch.arange(2)
    return [(first + 2 * rows * i) % EXPERTS for i in range(max(EXPERTS // (2 * rows), 1))]


def _experts(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        gate, up = F.linear(x[token], w1[e]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, w2[e])
        y.index_add_(0, token, out * weights[token, slot, None].to(out.dtype))
    return y


def linear_ce() -> Iterator[Case]:
    """The head with its loss, forward and backward, bf16."""
    for T, D, V in HEADS:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(T, D, generator=draw).bfloat16().requires_grad_()
        w = (0.03 * torch.randn(V, D, generator=draw)).bfloat16().requires_grad_()
        labels = torch.randint(V, (T,), generator=draw)

        def with_loss(loss, x=x, w=w, labels=labels) -> Run:
            def run() -> Sequence[Tensor]:
                return torch.autograd.grad(loss(x, w, labels), [x, w])

            return run

        def in_fp32(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, w).float(), y, reduction="sum")

        def plain(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, w), y, reduction="sum")

        runs = {
            "ptm amx": with_isa("amx", with_loss(linear_cross_entropy)),
            "ptm, torch": with_isa(None, with_loss(linear_cross_entropy)),
            "torch, fp32 logits": with_loss(in_fp32),
            "torch, bf16 logits": with_loss(plain),
        }
        if not any("amx" in name for name in ours("linear_ce", runs["ptm amx"])):
            del runs["ptm amx"]
        wide = [t.detach().double().requires_grad_() for t in (x, w)]
        exact = with_loss(plain, *wide)
        yield Case("linear_ce", f"{T} x {D}, {V} words, forward and backward, bf16", runs, exact,
                   4.0 * D * (T + V), 6.0 * T * D * V)  # fmt: skip


def _cold(weights: list[Tensor], size_bytes: float) -> list[Tensor]:
    return weights + [weights[0].clone() for _ in range(int(COLD_BYTES / size_bytes))]


def _copy(weight: PackedWeight) -> PackedWeight:
    return replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone())


def _torch_int4(x: Tensor, q: Quantized) -> Run:
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.codes_NK.int(), 1)
    scale = q.scale_NG.float().t()
    both = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous().bfloat16()
    turn = cycle(_cold([codes], codes.numel() * codes.element_size()))
    group = q.grid.group
    return lambda: [torch.ops.aten._weight_int4pack_mm_for_cpu(x, next(turn), group, both)]
