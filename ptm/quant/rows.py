"""Rows of codes as bytes: any run of rows of a matrix is a run of bytes, so an engine that cuts
matrices at rows can hold them as codes.

    row   [ scales fp16 (G,) | codes (K x bits / 8) | zeros to a multiple of 4 ]

    4 bits   codes 2i (low half) and 2i + 1 in a byte
    8 bits   a code a byte
    6 bits   the four low bits of all codes as above, then the two high ones, four codes a byte

Scales are those of groups of 128 inputs, or of the largest power of two that divides K; a grid with
larger groups has its scales repeated, which changes no weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptm.quant.grid import Grid, GridKind, Quantized

MOST_GROUP = 128
LEAST_GROUP = 16


@dataclass(frozen=True)
class RowFormat:
    """Rows on one symmetric grid; an element of the pages they lie in takes `element_bytes`."""

    kind: GridKind
    element_bytes: int

    @property
    def grid(self) -> Grid:
        return Grid(self.kind)

    def group(self, num_inputs: int) -> int:
        return math.gcd(num_inputs, MOST_GROUP)

    def row_bytes(self, num_inputs: int) -> int:
        used = num_inputs // self.group(num_inputs) * 2 + num_inputs * self.grid.bits // 8
        return -(-used // 4) * 4

    def row_numel(self, num_inputs: int) -> int:
        """Elements of pages that a row takes."""
        return self.row_bytes(num_inputs) // self.element_bytes

    def refusal(self, grid: Grid, num_inputs: int) -> tuple[str, str] | None:
        """Why rows of codes on that grid cannot be held, and what an export must be told; None if
        they can."""
        group, own = self.group(num_inputs), grid.group or num_inputs
        if grid.kind is not self.kind:
            return f"is of {grid.kind}", ""
        if not grid.is_symmetric:
            return "has zero points", "symmetric=true"
        if own % group or group < LEAST_GROUP:
            return f"has groups of {own} of {num_inputs} inputs", f"group={group}"
        return None

    def encode(self, q: Quantized) -> Tensor:
        """(N, row_bytes) uint8. Raises ValueError for codes that cannot be held."""
        N, K = q.codes_NK.shape
        group, own = self.group(K), q.grid.group or K
        if (found := self.refusal(q.grid, K)) is not None:
            raise ValueError(found[0])
        if q.scale_NG.dtype != torch.float16:
            raise ValueError(f"has scales in {str(q.scale_NG.dtype).removeprefix('torch.')}")
        scale_NG = q.scale_NG.repeat_interleave(own // group, dim=1)[:, : K // group]
        out = torch.zeros(N, self.row_bytes(K), dtype=torch.uint8)
        start = 2 * scale_NG.shape[1]
        out[:, :start] = scale_NG.contiguous().view(torch.uint8)
        for part in _packed(q.codes_NK, self.grid.bits):
            out[:, start : start + part.shape[1]] = part
            start += part.shape[1]
        return out

    def decode(self, rows: Tensor, num_inputs: int) -> Tensor:
        """(N, K) fp32 of (N, row_bytes) uint8: the bits of `Quantized.dequantize`."""
        N, K, grid, group = len(rows), num_inputs, self.grid, self.group(num_inputs)
        start = 2 * (K // group)
        scale_NG = rows[:, :start].contiguous().view(torch.float16)
        codes = _unpacked(rows[:, start:], grid.bits, K).view(N, -1, group)
        return grid.weight_of(codes, scale_NG.float()[..., None], float(grid.middle)).view(N, K)


def _packed(codes_NK: Tensor, bits: int) -> list[Tensor]:
    if bits == 8:
        return [codes_NK]
    low = codes_NK & 15
    parts = [low[:, 0::2] | low[:, 1::2] << 4]
    if bits == 6:
        high = codes_NK >> 4
        parts += [high[:, 0::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6]
    return parts


def _unpacked(rows: Tensor, bits: int, K: int) -> Tensor:
    if bits == 8:
        return rows[:, :K].contiguous()
    low = rows[:, : K // 2]
    codes = torch.stack([low & 15, low >> 4], dim=-1).view(len(rows), K)
    if bits == 6:
        high = rows[:, K // 2 : K // 2 + K // 4]
        parts = [high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6]
        codes |= torch.stack(parts, dim=-1).view(len(rows), K) << 4
    return codes
