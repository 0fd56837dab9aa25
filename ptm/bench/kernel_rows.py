"""Cases of `ptm bench kernels` for ops on rows: norm, rotary positions, router, grids,
gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.bench.kernel_case import Case, Run, ours
from ptm.kernels.pieces import add_pieces_norms
from ptm.kernels.rmsnorm import add_rms_norm, rms_norm_reference
from ptm.kernels.rope import rope_angles, rope_reference
from ptm.kernels.rope import rope_qk as turn
from ptm.kernels.router import attention_router, attention_router_reference
from ptm.quant.fake_quant import fake_quant, on_grid
from ptm.quant.grid import Grid, GridKind

TYPES = (torch.float32, torch.bfloat16)
Function = Callable[..., Sequence[Tensor]]


def add_rmsnorm() -> Iterator[Case]:
    """The width and rows of a micro-batch of the mini model and of the published one."""
    for dtype in TYPES:
        for rows, width in ((4096, 512), (1024, 2048)):
            inputs = [_random(rows, width, dtype=dtype) for _ in range(2)]
            inputs.append(_random(width, dtype=dtype))
            grads = [_random(rows, width, dtype=dtype).detach() for _ in range(2)]
            one = rows * width * dtype.itemsize
            yield from _pair(
                "add_rmsnorm",
                f"{rows} x {width} {_name(dtype)}",
                inputs,
                grads,
                lambda x, r, w: add_rms_norm(x, r, w, 1e-6),
                {
                    "torch, F.rms_norm": lambda x, r, w: (
                        F.rms_norm(x + r, (x.shape[-1],), w, 1e-6),
                        x + r,
                    ),
                    "published code": lambda x, r, w: (rms_norm_reference(x + r, w, 1e-6), x + r),
                },
                exact=lambda x, r, w: (rms_norm_reference(x + r, w, 1e-6), x + r),
                moved=(4 * one, 4 * one),
            )


def rope_qk() -> Iterator[Case]:
    """Heads of 64 with half of each turned, 4 rows of 1024; one row of heads of 256."""
    for dtype in TYPES:
        for B, L, H, K in ((4, 1024, 8, 64), (1, 1024, 8, 256)):
            angles = rope_angles(torch.arange(L)[None], rotary_dim=K // 2, base=1e4, mode="fp32")
            inputs = [_random(B, L, H * K, dtype=dtype) for _ in range(2)]
            # As attention's backward lays them out.
            grads = [_random(B, L, H, K, dtype=dtype).detach().transpose(1, 2) for _ in range(2)]

            def published(q: Tensor, k: Tensor, *, angles=angles, H=H, K=K) -> Sequence[Tensor]:
                x = torch.cat([q, k], dim=-1).view(*q.shape[:2], H, 2, K)
                return rope_reference(x, *angles).unbind(0)

            moved = 4 * B * L * H * K * dtype.itemsize
            yield from _pair(
                "rope_qk",
                f"{B} x {L}, {H} heads of {K}, {_name(dtype)}",
                inputs,
                grads,
                lambda q, k, angles=angles, H=H: turn(q, k, *angles, num_heads=H),
                {"published code": published},
                exact=published,
                moved=(moved, moved),
            )


def attn_router() -> Iterator[Case]:
    """4096 tokens of the published 32 experts, 2 active."""
    T, E, A = 4096, 32, 2

    def router(qkv: Tensor) -> Sequence[Tensor]:
        chosen = attention_router(qkv, A)
        return (chosen.weights_TA,)

    def published(qkv: Tensor) -> Sequence[Tensor]:
        wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
        q, k, v = wide.chunk(3, dim=-1)
        return (attention_router_reference(q, k, v, A).weights_TA,)

    for dtype in TYPES:
        read, chosen = 3 * T * E * dtype.itemsize, T * A * (4 + 8)
        scores = 4 * T * E
        yield from _pair(
            "attn_router",
            f"{T} tokens, {E} experts, {A} active, {_name(dtype)}",
            [_random(T, 3 * E, dtype=dtype)],
            [_random(T, A).detach()],
            router,
            {"published code": published},
            exact=published,
            moved=(read + chosen + scores, 2 * read + chosen + scores),
        )


def fake_quant_cases() -> Iterator[Case]:
    """The first matrices of a layer's experts at mini, groups of 128."""
    E, N, K, group = 32, 1024, 256, 128
    for kind, dtype in itertools.product((GridKind.int4, GridKind.fp6_e2m3), TYPES):
        grid = Grid(kind, group)
        w = _random(E, N, K, dtype=dtype).detach()

        def torchs(w: Tensor, grid: Grid = grid) -> Tensor:
            groups = w.float().view(-1, group)
            scale = (groups.abs().amax(1) / grid.largest).half().float()
            zero = torch.zeros_like(scale, dtype=torch.int32)
            ends = -grid.middle, grid.middle - 1
            near = torch.fake_quantize_per_channel_affine(groups, scale, zero, 0, *ends)
            return near.view(w.shape).to(w.dtype)

        runs = ours("fake_quant", lambda w=w, grid=grid: [fake_quant(w, grid)])
        if grid.is_int:
            runs["torch, fake_quantize"] = lambda w=w: [torchs(w)]
        yield Case(
            "fake_quant",
            f"{E} x {N} x {K} {_name(dtype)}, {kind}, groups of {group}",
            runs,
            lambda w=w, grid=grid: [on_grid(w, grid).dequantize().double().view(w.shape)],
            2 * w.numel() * dtype.itemsize,
        )


def add_pieces_cases() -> Iterator[Case]:
    """16 M elements from one and from two ranks, 65,536 at a time as the engine has them."""
    chunk, count = 1 << 16, 256
    for num_ranks in (1, 2):
        pieces = _random(num_ranks, count * chunk, dtype=torch.bfloat16).detach()
        parts = pieces.split(chunk, 1)

        def put(parts: Sequence[Tensor] = parts) -> Sequence[Tensor]:
            total = torch.empty(count, chunk)
            norms = [
                add_pieces_norms(t, p, replaces=True, chunk=chunk) for t, p in zip(total, parts)
            ]
            return [total, torch.cat(norms)]

        def torchs(parts: Sequence[Tensor] = parts) -> Sequence[Tensor]:
            total = torch.empty(count, chunk)
            for t, p in zip(total, parts):
                torch.sum(p, 0, dtype=torch.float32, out=t)
            return [total, torch.linalg.vector_norm(total, dim=1, dtype=torch.float64)]

        def exact(pieces: Tensor = pieces) -> Sequence[Tensor]:
            total = pieces.double().sum(0).view(count, chunk)
            return [total, total.norm(dim=1)]

        yield Case(
            "add_pieces",
            f"{num_ranks} x {count} x {chunk} bf16, put, with norms",
            {**ours("add_pieces", put), "torch, sum and norm": torchs},
            exact,
            pieces.numel() * 2 + count * chunk * 4,
        )


def _pair(
    op: str,
    what: str,
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    function: Function,
    peers: dict[str, Function],
    *,
    exact: Function,
    moved: tuple[float, float],
) -> Iterator[Case]:
    """A function alone and with its backward, as two cases; `moved`: bytes of either."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    runs = ours(op, lambda: function(*inputs))
    runs |= {name: _call(peer, inputs) for name, peer in peers.items()}
    yield Case(op, f"{what}, forward", runs, _detached(_call(exact, wide)), moved[0])
    both = {name: _and_back(run, inputs, grads) for name, run in runs.items()}
    exact_both = _and_back(_call(exact, wide), wide, [g.double() for g in grads])
    yield Case(op, f"{what}, forward and backward", both, exact_both, sum(moved))


def _and_back(run: Run, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Run:
    return lambda: torch.autograd.grad(run(), inputs, grads)


def _call(function: Function, inputs: Sequence[Tensor]) -> Run:
    return lambda: function(*inputs)


def _detached(run: Run) -> Run:
    return lambda: [t.detach() for t in run()]


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=draw).to(dtype).requires_grad_()


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
