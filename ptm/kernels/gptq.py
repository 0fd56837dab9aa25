"""GPTQ's loops over the inputs of a block, the errors by which scales are chosen, and the products
of inputs that a Hessian is made of (csrc/gptq).

The specification is ptm/quant/gptq.py's `_Columns.sweep` and `descend`, and `Grid.errors` of
ptm/quant/grid.py; the bits are theirs, on every instruction set and any number of threads.
`products` is `add_products` of ptm/quant/gptq.py where the CPU has tiles: by sums of another
order, so up to fp32's rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptm.kernels import native

native.declare("gptq_sweep", "gptq_descend", "gptq_errors", "gptq_products")


class GridSpec(NamedTuple):
    """A grid of ptm/quant/grid.py: `bits` 4 and 8 are integers, 6 a sign, 5 - `mantissa` bits of
    exponent and `mantissa` bits; size: inputs that share a scale."""

    bits: int
    mantissa: int
    size: int


def serves(*tensors: Tensor) -> bool:
    """Whether kernels take these, all fp32."""
    return tensors[0].dtype is torch.float32 and native.serves("gptq_sweep", *tensors)


def sweep(
    w_BN: Tensor,
    upper_BB: Tensor,
    order_B: Tensor,
    near_KN: Tensor,
    scale_GN: Tensor,
    zero_GN: Tensor | None,
    grid: GridSpec,
) -> Tensor:
    """Errors (B, N) of the inputs order (B,). Modifies: near, in these rows."""
    errors = torch.empty_like(w_BN)
    native.call(
        "gptq_sweep", w_BN, upper_BB.t().contiguous(), order_B, near_KN, errors, scale_GN, zero_GN,
        *w_BN.shape, grid.size, grid.bits, grid.mantissa,
    )  # fmt: skip
    return errors


def descend(
    slope_BN: Tensor,
    hessian_BB: Tensor,
    dead_B: Tensor,
    near_BN: Tensor,
    start: int,
    scale_GN: Tensor,
    zero_GN: Tensor | None,
    grid: GridSpec,
) -> bool:
    """Whether a code moved, of the inputs from `start` on. Modifies: slope, near."""
    moved = torch.zeros(1, dtype=torch.int32)
    native.call(
        "gptq_descend", slope_BN, hessian_BB.contiguous(), dead_B, near_BN, scale_GN, zero_GN,
        moved, start, *slope_BN.shape, grid.size, grid.bits, grid.mantissa,
    )  # fmt: skip
    return bool(moved.item())


def errors(
    w_NK: Tensor, importance_K: Tensor, scale_CNG: Tensor, zero_CNG: Tensor | None, grid: GridSpec
) -> Tensor:
    """Sums of importance x (near - w)^2 over each group, for C candidates of its scale: (C, N, G),
    of fp32 scales and zeros."""
    out = torch.empty_like(scale_CNG)
    native.call(
        "gptq_errors", w_NK, importance_K, scale_CNG, zero_CNG, out, len(scale_CNG), *w_NK.shape,
        grid.size, grid.bits, grid.mantissa,
    )  # fmt: skip
    return out


def multiplies(a_TM: Tensor, b_TN: Tensor) -> bool:
    """Whether `products` takes these, both bf16."""
    widths = a_TM.shape[-1] | b_TN.shape[-1]
    is_bf16 = a_TM.dtype is torch.bfloat16
    return is_bf16 and widths % 32 == 0 and native.serves("gptq_products", a_TM, b_TN)


def products(a_TM: Tensor, b_TN: Tensor, sum_MN: Tensor) -> None:
    """sum += a^T b in fp32; where b is a, what is below the diagonal is of no use. On any number of
    threads the same bits. M, N multiples of 32."""
    is_upper = a_TM is b_TN
    a_TM = a_TM.contiguous()
    b_TN = a_TM if is_upper else b_TN.contiguous()
    native.call("gptq_products", a_TM, b_TN, sum_MN, *a_TM.shape, b_TN.shape[1], is_upper)
