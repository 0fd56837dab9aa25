"""Cases of `ptm bench kernels` for attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ptm.bench.kernel_case import Case, ours
from ptm.bench.kernel_moe import passed
from ptm.kernels.attention import attention_reference, causal_attention

SHAPES = [  # B, H, L, K: the mini model's micro-batch, wide heads, a long row
    (4, 4, 512, 128),
    (1, 8, 1024, 256),
    (1, 2, 4096, 128),
]


def attention() -> Iterator[Case]:
    """Causal, bf16; q and k as the rotation makes them, v as its projection. The work is that of
    the half of the square that is seen: two products forward, five backward."""
    for B, H, L, K in SHAPES:
        q, k = (torch.randn(B, H, L, K).bfloat16().requires_grad_() for _ in range(2))
        v, grad = (torch.randn(B, L, H, K).bfloat16().transpose(1, 2) for _ in range(2))
        inputs = [q, k, v.requires_grad_()]
        functions = {
            "ours": causal_attention,
            "torch, SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "exact": lambda q, k, v: attention_reference(q.double(), k.double(), v.double()),
        }
        product, moved = B * H * L * L * K, 2.0 * 4 * q.numel()
        for name, passes, products in (("forward", 1, 2), ("forward and backward", 3, 7)):
            runs = {n: passed(f, inputs, grad, passes) for n, f in functions.items()}
            yield Case(
                "attention",
                f"{B} x {L}, {H} heads of {K}, bf16, {name}",
                {**ours("attention", runs["ours"]), "torch, SDPA": runs["torch, SDPA"]},
                runs["exact"],
                bytes=passes * moved,
                flops=1.0 * products * product,
            )
