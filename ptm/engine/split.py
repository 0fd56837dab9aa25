"""The split master: a bf16 weight and 16 more bits make the exact fp32 master.

    master  [s eeeeeeee mmmmmmm | mmmmmmmmmmmmmmmm]
    weight  = the upper half, rounded to nearest, ties away from zero     (bf16, what forward uses)
    rest    = the lower half as a signed number, in [-32768, 32767]       (int16)

so that bits(master) = (bits(weight) << 16) + rest, without loss: exact AdamW in fp32 costs 12 bytes
a parameter instead of 14 with a separate weight. Ties go away from zero, not to even as in
`Tensor.bfloat16()`, because a signed half can tell only one of the two directions; they are one
value in 65,536. Non-finite masters never occur: the engine skips such steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def join(weight: Tensor, rest: Tensor, out: Tensor) -> Tensor:
    """Masters (n,) fp32 into `out`, from weight (n,) bf16 and rest (n,) int16."""
    bits = out.view(torch.int32)
    bits.copy_(weight.view(torch.int16))
    bits.bitwise_left_shift_(16).add_(rest)
    return out


def split(master: Tensor, weight: Tensor, rest: Tensor) -> None:
    """The inverse of `join`. Modifies: weight, rest, and master, whose bits are used up."""
    bits = master.view(torch.int32)
    rest.copy_(bits)  # keeps the low 16 bits
    weight.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))
