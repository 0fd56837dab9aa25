"""The grids that weights are quantized to: the one definition of how a number becomes a code and
back.

    w[n, k]  ~  scale[n, g] * (value(code[n, k]) - zero[n, g]),   g = k // group

    int4, int8     value(code) = code, 0 ... 2^bits - 1; zero = 2^(bits-1) where symmetric
    fp6_e3m2       sign, 3 bits of exponent (bias 3), 2 of mantissa: 0, 0.0625 ... 28; no zero
    fp6_e2m3       sign, 2 bits of exponent (bias 1), 3 of mantissa: 0, 0.125 ... 7.5; no zero

A scale is what is stored: rounded to its type first, everything after is measured with it. Decoding
is one fp32 product of the widened scale with an exact small number, so every reader, kernel and
fake quantization that follows this file gives the same bits. Rounding is to nearest on w / scale in
fp32, ties to even codes (to the even multiple of the step, for integers before the zero is added);
what lies outside is clamped. A group of zeros, or one whose scale underflows, has scale 0 and
decodes to 0. A scale may be negative.

Source of the 6-bit grids: FP6-LLM, arXiv 2401.14112; of the integer ones: GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptm.common.config import Choice
from ptm.kernels import gptq as kernels
from ptm.kernels.fake_quant import NOT_FINITE


class GridKind(Choice):
    int4 = "int4"
    int8 = "int8"
    fp6_e3m2 = "fp6_e3m2"
    fp6_e2m3 = "fp6_e2m3"


_INT_BITS = {GridKind.int4: 4, GridKind.int8: 8}
_SHRINK = {GridKind.int4: 0.5, GridKind.int8: 0.9, GridKind.fp6_e3m2: 0.5, GridKind.fp6_e2m3: 0.5}
"""The least part of the plain scale that is tried where a better one is searched."""
_FP6 = {GridKind.fp6_e3m2: (3, 2, 3), GridKind.fp6_e2m3: (2, 3, 1)}
"""Bits of exponent and mantissa, bias."""
LANES = 16
"""Of the sums of `Grid.errors`."""


@dataclass(frozen=True)
class Grid:
    """group: values along K that share a scale, 0 for a whole row; the last may be shorter."""

    kind: GridKind
    group: int = 128
    is_symmetric: bool = True
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        assert self.group >= 0, self.group
        assert self.is_symmetric or self.is_int, f"{self.kind} has no zero points"

    @property
    def is_int(self) -> bool:
        return self.kind in _INT_BITS

    @property
    def bits(self) -> int:
        return _INT_BITS.get(self.kind, 6)

    @property
    def mantissa_bits(self) -> int:
        """Of a 6-bit grid."""
        return _FP6[self.kind][1]

    @property
    def middle(self) -> int:
        """Zero point of a symmetric integer grid."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> float:
        """|w| that a symmetric grid maps to its end at scale 1, before clamping."""
        if self.is_int:
            return (2**self.bits - 1) / 2
        return float(self.values()[: 2**5].max())

    @property
    def worst_error(self) -> float:
        """Largest |w - decode(encode(w))| over scale, for |w| <= largest x scale."""
        if self.is_int:
            return 0.5
        steps = self.values()[: 2**5].diff()
        return float(steps.max()) / 2

    def num_groups(self, num_inputs: int) -> int:
        return -(-num_inputs // self.group) if self.group else 1

    def values(self) -> Tensor:
        """What each code stands for at scale 1 and zero 0, (2^bits,) fp32."""
        return _values(self.kind)

    def encode(self, w_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None = None) -> Tensor:
        """Codes (N, K) uint8 of fp32 weights (N, K) with stored scales (N, G)."""
        K = w_NK.shape[1]
        return self.code_of(w_NK.float(), *self.spread(scale_NG, zero_NG, K))

    def decode(self, codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None = None) -> Tensor:
        """Weights (N, K) fp32 that the codes stand for."""
        return self.weight_of(codes_NK, *self.spread(scale_NG, zero_NG, codes_NK.shape[1]))

    def spread(
        self, scale_NG: Tensor, zero_NG: Tensor | None, num_inputs: int
    ) -> tuple[Tensor, Tensor | float]:
        """Scale and zero of each weight in fp32, (N, K) each; of a symmetric grid one zero."""
        assert (zero_NG is None) == self.is_symmetric, self
        zero = self.middle if zero_NG is None else self._spread(zero_NG, num_inputs)
        return self._spread(scale_NG, num_inputs).float(), (
            float(zero) if isinstance(zero, int) else zero.float()
        )

    def code_of(self, w: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
        """Codes, uint8, of fp32 weights whose scales and zeros lie beside them."""
        ratio = w / divisor_of(scale)
        if not self.is_int:
            return _nearest_fp6(ratio, self.kind)
        return ratio.round_().add_(zero).clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def weight_of(self, codes: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
        """Weights, fp32, of codes whose scales and zeros lie beside them."""
        if self.is_int:
            return scale * (codes.float() - zero)
        return scale * self.values().to(codes.device)[codes.long()]

    def nearest(self, w: Tensor, scale: Tensor, divisor: Tensor, zero: Tensor | float) -> Tensor:
        """`weight_of` the `code_of` weights, without codes between; divisor: `divisor_of` scale."""
        ratio = w / divisor
        if not self.is_int:
            return self.weight_of(_nearest_fp6(ratio, self.kind), scale, zero)
        return ratio.round_().add_(zero).clamp_(0, 2**self.bits - 1).sub_(zero).mul_(scale)

    def fake(self, w_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None = None) -> Tensor:
        """The grid's nearest to each weight, (N, K) fp32."""
        return self.decode(self.encode(w_NK, scale_NG, zero_NG), scale_NG, zero_NG)

    def scales(
        self, w_NK: Tensor, importance_K: Tensor | None = None, num_candidates: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Stored scales (N, G) and, where not symmetric, zero points (N, G) uint8.

        From the largest |w| of a group; with candidates, that many scales from a little above it
        down to half of it (0.9 with int8) are tried, and the one with the least squared error is
        kept, each input weighted by its importance (K,). int4 has one code more below 0 than above:
        negative scales are tried too, which turn it to the side with the largest |w|.
        Raises: ValueError where a weight is not finite, or a scale overflows its type.
        """
        grouped = self._grouped(w_NK.float())
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        if self.is_symmetric:
            span = torch.maximum(low.abs(), high) / self.largest
        else:
            span = (high - low) / (2**self.bits - 1)
        best = self._stored(span)
        if not bool(best.isfinite().all()):
            raise ValueError(NOT_FINITE)
        best_zero = self._zero_points(low, best)
        if num_candidates < 1:
            return best, best_zero
        top = self.largest / (self.middle - 1) if self.is_int and self.is_symmetric else 1.0
        shrinks = torch.linspace(top, _SHRINK[self.kind], num_candidates).tolist()
        if self.kind is GridKind.int4 and self.is_symmetric:
            shrinks += [-shrink for shrink in shrinks]
        tried = [best, *(self._stored(span * shrink) for shrink in shrinks)]
        zeros = [self._zero_points(low * s, scale) for s, scale in zip((1.0, *shrinks), tried)]
        errors = self.errors(w_NK, importance_K, tried, zeros)
        least = errors[0]
        for error, scale, zero in zip(errors[1:], tried[1:], zeros[1:]):
            is_better = error < least
            least = torch.where(is_better, error, least)
            best = torch.where(is_better, scale, best)
            if zero is not None and best_zero is not None:
                best_zero = torch.where(is_better, zero, best_zero)
        return best, best_zero

    def errors(
        self,
        w_NK: Tensor,
        importance_K: Tensor | None,
        scales_NG: Sequence[Tensor],
        zeros_NG: Sequence[Tensor | None],
    ) -> Tensor:
        """Squared error of each group with each of C scales, each input weighted, (C, N, G).

        A sum has LANES parts, to which values go in turn, and these are added by halves: an order
        that kernels of any width can keep.
        """
        w_NK = w_NK.float()
        K = w_NK.shape[1]
        importance_K = w_NK.new_ones(K) if importance_K is None else importance_K.float()
        if kernels.serves(w_NK, importance_K):
            zeros = [zero.float() for zero in zeros_NG if zero is not None]
            return kernels.errors(
                w_NK.contiguous(),
                importance_K.contiguous(),
                torch.stack([scale.float() for scale in scales_NG]),
                torch.stack(zeros) if zeros else None,
                self.kernel_spec(K),
            )
        grouped, weight = self._grouped(w_NK), self._grouped(importance_K.view(1, K))
        return torch.stack(
            [self._error(grouped, weight, *each) for each in zip(scales_NG, zeros_NG)]
        )

    def kernel_spec(self, num_inputs: int) -> kernels.GridSpec:
        mantissa = 0 if self.is_int else self.mantissa_bits
        return kernels.GridSpec(self.bits, mantissa, self.group or num_inputs)

    def _stored(self, scale: Tensor) -> Tensor:
        return scale.to(self.scale_dtype)

    def _zero_points(self, low: Tensor, scale: Tensor) -> Tensor | None:
        if self.is_symmetric:
            return None
        wide = scale.float()
        zero = torch.where(wide > 0, -low / wide, 0.0)
        return zero.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def _error(
        self, grouped_NGk: Tensor, weight_1Gk: Tensor, scale_NG: Tensor, zero_NG: Tensor | None
    ) -> Tensor:
        """Weighted squared error of each group, (N, G)."""
        N, G, k = grouped_NGk.shape
        scale = scale_NG.reshape(N * G, 1).float()
        divisor = divisor_of(scale)
        zero = float(self.middle) if zero_NG is None else zero_NG.reshape(N * G, 1).float()
        near = self.nearest(grouped_NGk.reshape(N * G, k), scale, divisor, zero)
        near.sub_(grouped_NGk.reshape(N * G, k)).square_()
        return _sum(near.view(N, G, k).mul_(weight_1Gk))

    def _grouped(self, w_NK: Tensor) -> Tensor:
        """(N, G, group), with zeros behind the last input: they change no largest, no error."""
        N, K = w_NK.shape
        G, size = self.num_groups(K), self.group or K
        padded = torch.nn.functional.pad(w_NK, (0, G * size - K))
        return padded.view(N, G, size)

    def _spread(self, of_NG: Tensor, num_inputs: int) -> Tensor:
        """One value for each input, (N, K)."""
        size = self.group or num_inputs
        assert of_NG.shape[1] == self.num_groups(num_inputs), (of_NG.shape, num_inputs, self)
        return of_NG.repeat_interleave(size, dim=1)[:, :num_inputs]


def divisor_of(scale: Tensor) -> Tensor:
    """What weights are divided by: the scale, infinite where that is 0."""
    return scale.where(scale != 0, torch.inf)


@dataclass
class Quantized:
    """One linear's weights as codes.

    Shapes: codes (N, K) uint8, scale (N, G) of the grid's scale type, zero (N, G) uint8 or None.
    """

    grid: Grid
    codes_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None = None

    def dequantize(self) -> Tensor:
        """(N, K) fp32."""
        return self.grid.decode(self.codes_NK, self.scale_NG, self.zero_NG)

    @property
    def size_bytes(self) -> int:
        """Of codes, scales and zero points when packed."""
        N, K = self.codes_NK.shape
        zeros = 0 if self.zero_NG is None else self.zero_NG.numel() * self.grid.bits
        bits = N * K * self.grid.bits + zeros
        return -(-bits // 8) + self.scale_NG.numel() * self.scale_NG.element_size()


def round_to_nearest(w_NK: Tensor, grid: Grid) -> Quantized:
    """The plain quantization of a weight, without data."""
    scale, zero = grid.scales(w_NK)
    return Quantized(grid, grid.encode(w_NK, scale, zero), scale, zero)


def _sum(x: Tensor) -> Tensor:
    """Over the last axis, in the order of `Grid.errors`."""
    parts = torch.nn.functional.pad(x, (0, -x.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    total = parts[..., 0, :].clone()
    for i in range(1, parts.shape[-2]):
        total += parts[..., i, :]
    while (half := total.shape[-1] // 2) > 0:
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


@functools.cache
def _values(kind: GridKind) -> Tensor:
    if kind in _INT_BITS:
        return torch.arange(2 ** _INT_BITS[kind], dtype=torch.float32)
    _, mantissa_bits, bias = _FP6[kind]
    code = torch.arange(2**5)
    exponent, mantissa = code >> mantissa_bits, code % 2**mantissa_bits
    fraction = mantissa / 2**mantissa_bits
    normal = (1 + fraction) * 2.0 ** (exponent - bias)
    subnormal = fraction * 2.0 ** (1 - bias)
    positive = torch.where(exponent > 0, normal, subnormal).float()
    return torch.cat([positive, -positive])


def _nearest_fp6(ratio: Tensor, kind: GridKind) -> Tensor:
    """Codes of the nearest values; of two equally near the even code; 0 is never negative.

    In the binade of |ratio| (the lowest normal one below it too) values are whole multiples of a
    step, and counting steps on from there gives the code: rounding is that of whole numbers.
    """
    exponent_bits, mantissa_bits, bias = _FP6[kind]
    size = ratio.abs()
    lowest, highest = 1 - bias, 2**exponent_bits - 1 - bias
    binade = (size.clamp(min=2.0**lowest).frexp().exponent - 1).clamp_(max=highest)
    steps = size * _power_of_two(mantissa_bits - binade)
    code = steps.round_().to(torch.int32) + (binade + bias - 1 << mantissa_bits)
    code = code.clamp_(max=2**5 - 1)
    return torch.where((ratio < 0) & (code > 0), code + 2**5, code).to(torch.uint8)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Exact 2^exponent in fp32, of int32 exponents in the normal range."""
    return (exponent + 127 << 23).view(torch.float32)
