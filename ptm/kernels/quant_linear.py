"""Products with quantized weights, for inference: a linear, and routed SwiGLU experts.

    w[n, k] = scale[n, g] * (code[n, k] - zero[n, g])     4 and 8 bits, g = k // group
    w[n, k] = scale[n, g] * values[code[n, k]]            6 bits

`pack` lays codes and scales out for the kernels (csrc/wq/packed.h has the layout), `unpack` is its
exact inverse and the reference. The kernels multiply rows with codes, which bf16 holds exactly, sum
in fp32, and multiply a group's sum with its scale: weights are never rounded, so what differs from
the product with the unpacked weights in fp64 is fp32 sums (1e-6) and the one rounding of the
result. A few rows become whole numbers of 22 bits by group, whose products are exact sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.kernels import native
from ptm.kernels.moe_mlp import CUDA_EXPERTS

native.declare("wq_linear", "wq_moe")

PANEL, STEP = 16, 32  # outputs and inputs are padded to these
CUDA_ROWS = 8  # the CUDA kernels read a weight's codes once for 4 rows, which is for decoding


@dataclass(frozen=True)
class PackedWeight:
    """Weights (..., N, K) as the kernels read them; with E in front, those of E experts.

    Shapes: codes (..., P, bytes) uint8, scale (..., P, G, 16) fp16 or fp32, zero int8 likewise or
    None; values (2^bits,) fp32; P panels of 16 outputs.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    values: Tensor
    bits: int
    group: int
    num_outputs: int
    num_inputs: int

    @property
    def size_bytes(self) -> int:
        zero = 0 if self.zero is None else self.zero.numel()
        return self.codes.numel() + self.scale.numel() * self.scale.element_size() + zero

    @property
    def padded_inputs(self) -> int:
        return -(-self.num_inputs // STEP) * STEP


def pack(
    codes_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None = None,
    *,
    bits: int,
    group: int,
    values: Tensor | None = None,
) -> PackedWeight:
    """Lay one linear's codes out for the kernels.

    Shapes: codes (N, K) uint8, scale (N, G) fp16, bf16 or fp32, zero (N, G) uint8 or None for
    2^(bits-1); group a multiple of 32, or 0 for one scale a row; values (64,) with 6 bits,
    of which the top one is the sign.
    """
    N, K = codes_NK.shape
    assert bits in (4, 6, 8) and (bits == 6) == (values is not None), (bits, values)
    assert group % STEP == 0, group
    if values is None:
        values = torch.arange(2**bits, dtype=torch.float32) - 2 ** (bits - 1)
    assert torch.equal(values, values.bfloat16().float()), "values are exact in bf16"
    assert bits != 6 or torch.equal(values[32:], -values[:32]), "the top bit is the sign"
    padded = F.pad(codes_NK, (0, -K % STEP, 0, -N % PANEL))
    panels = padded.view(-1, PANEL, padded.shape[1])
    scale = scale_NG if scale_NG.dtype is torch.float16 else scale_NG.float()
    zero = None
    if zero_NG is not None:
        zero = _by_panel((zero_NG.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8))
    return PackedWeight(
        codes=_LAYOUTS[bits][0](panels).flatten(1),
        scale=_by_panel(scale),
        zero=zero,
        values=values.contiguous(),
        bits=bits,
        group=group or padded.shape[1],
        num_outputs=N,
        num_inputs=K,
    )


def regrouped(weight: PackedWeight, group: int) -> PackedWeight:
    """The same numbers in groups that divide its own: scales and zeros are repeated."""
    times, left = divmod(weight.group, group)
    assert not left, (weight.group, group)
    if times == 1:
        return weight
    count = -(-weight.padded_inputs // group)

    def repeated(of: Tensor) -> Tensor:
        return of.repeat_interleave(times, -2)[..., :count, :].contiguous()

    zero = None if weight.zero is None else repeated(weight.zero)
    return replace(weight, scale=repeated(weight.scale), zero=zero, group=group)


def stack(weights: list[PackedWeight]) -> PackedWeight:
    """Experts of one shape as one, E in front."""
    first = weights[0]
    sizes = {(w.bits, w.group, w.num_outputs, w.num_inputs, w.zero is None) for w in weights}
    assert len(sizes) == 1, sizes
    zeros = [w.zero for w in weights if w.zero is not None]
    return PackedWeight(
        codes=torch.stack([w.codes for w in weights]),
        scale=torch.stack([w.scale for w in weights]),
        zero=torch.stack(zeros) if zeros else None,
        values=first.values,
        bits=first.bits,
        group=first.group,
        num_outputs=first.num_outputs,
        num_inputs=first.num_inputs,
    )


def unpack(weight: PackedWeight) -> Tensor:
    """The weights that the codes stand for, (..., N, K) fp32."""
    lead, N, K = weight.codes.shape[:-2], weight.num_outputs, weight.num_inputs
    panels = weight.codes.flatten(0, -2)
    codes = _LAYOUTS[weight.bits][1](panels).reshape(*lead, -1, weight.padded_inputs)
    values = weight.values[codes[..., :N, :K].long()]
    scale = _spread(weight.scale, weight).float()
    if weight.zero is None:
        return scale * values
    return scale * (values - _spread(weight.zero, weight).float())


def wq_linear_reference(x: Tensor, weight: PackedWeight) -> Tensor:
    """The definition; for tests, and where there is no kernel."""
    return (x.float() @ unpack(weight).t()).to(x.dtype)


def wq_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """x @ w^T. Shapes: x (..., K) bf16 or fp32 -> (..., N) in x's type."""
    if serves_linear(x):
        return torch.ops.ptm.wq_linear(x, *_tensors(weight), *_numbers(weight))
    return wq_linear_reference(x, weight)


def serves_linear(x: Tensor) -> bool:
    """Whether a kernel multiplies these rows with a packed weight."""
    is_few = x.device.type == "cpu" or x.numel() <= CUDA_ROWS * x.shape[-1]
    return is_few and native.serves("wq_linear", x)


def wq_moe_reference(
    x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, w1: PackedWeight, w2: PackedWeight
) -> Tensor:
    """The definition; for tests, and where there is no kernel."""
    y = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for e in ids_TA.unique().tolist():
        token, slot = torch.where(ids_TA == e)
        gate, up = (x_TD[token].float() @ unpack(_one(w1, e)).t()).chunk(2, dim=-1)
        inner = (F.silu(gate) * up).to(x_TD.dtype).float()
        out = inner @ unpack(_one(w2, e)).t()
        y.index_add_(0, token, out * weights_TA[token, slot].float().unsqueeze(1))
    return y.to(x_TD.dtype)


def wq_moe(
    x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, w1: PackedWeight, w2: PackedWeight
) -> Tensor:
    """Weighted sum of each token's experts, silu(x1) * x2 through w2, (x1, x2) = x w1^T.

    Shapes: x (T, D) bf16 or fp32; ids (T, A) int64, weights (T, A); w1 E x (2F, D), w2 E x (D, F)
    of one number of bits -> (T, D) in x's type.
    """
    assert w1.bits == w2.bits and w1.scale.dtype == w2.scale.dtype, (w1.bits, w2.bits)
    if serves_moe(x_TD, ids_TA, len(w1.codes)):
        return torch.ops.ptm.wq_moe(x_TD, ids_TA, weights_TA, *_tensors(w1)[:3], w1.group,
                                    *_tensors(w2), w2.group, w1.bits, w2.num_inputs)  # fmt: skip
    return wq_moe_reference(x_TD, ids_TA, weights_TA, w1, w2)


def serves_moe(x_TD: Tensor, ids_TA: Tensor, num_experts: int) -> bool:
    """Whether a kernel takes these rows through packed experts: on a GPU a few for each, in the
    mean, as their counts are known to the device alone."""
    few = num_experts <= CUDA_EXPERTS and ids_TA.numel() <= CUDA_ROWS * num_experts
    return (x_TD.device.type == "cpu" or few) and native.serves("wq_moe", x_TD)


def _tensors(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    return weight.codes, weight.scale, weight.zero, weight.values


def _numbers(weight: PackedWeight) -> tuple[int, int, int]:
    return weight.bits, weight.group, weight.num_outputs


def _one(weight: PackedWeight, e: int) -> PackedWeight:
    zero = None if weight.zero is None else weight.zero[e]
    return PackedWeight(weight.codes[e], weight.scale[e], zero, weight.values, *_numbers(weight),
                        weight.num_inputs)  # fmt: skip


def _by_panel(of_NG: Tensor) -> Tensor:
    """(N, G) -> (P, G, 16), zeros behind the last output."""
    padded = F.pad(of_NG, (0, 0, 0, -of_NG.shape[0] % PANEL))
    return padded.view(-1, PANEL, of_NG.shape[1]).transpose(1, 2).contiguous()


def _spread(of: Tensor, weight: PackedWeight) -> Tensor:
    """(..., P, G, 16) -> (..., N, K)."""
    rows = of.transpose(-1, -2).flatten(-3, -2)[..., : weight.num_outputs, :]
    return rows.repeat_interleave(weight.group, dim=-1)[..., : weight.num_inputs]


# Layouts: codes (P, 16, K) <-> bytes (P, K/block, ...). Of a block of four bits, byte i of word
# 2n + h holds inputs 4i + h (low nibble) and 4i + 2 + h.


def _pack4(codes: Tensor) -> Tensor:
    P, _, K = codes.shape
    parts = codes.view(P, PANEL, K // 8, 2, 2, 2)  # n, block, byte, nibble, parity
    both = parts[..., 0, :] | parts[..., 1, :] << 4
    return both.permute(0, 2, 1, 4, 3).contiguous()


def _unpack4(packed: Tensor) -> Tensor:
    P = packed.shape[0]
    both = packed.view(P, -1, PANEL, 2, 2).permute(0, 2, 1, 4, 3)
    return torch.stack([both & 15, both >> 4], dim=-2).reshape(P, PANEL, -1)


def _pack6(codes: Tensor) -> Tensor:
    P, _, K = codes.shape
    low = _pack4(codes & 15).view(P, K // 16, 128)
    parts = (codes >> 4).view(P, PANEL, K // 16, 2, 4, 2)  # n, block, byte, field, parity
    high = sum((parts[..., i, :] << 2 * i for i in range(1, 4)), parts[..., 0, :])
    high = high.permute(0, 2, 1, 4, 3).reshape(P, K // 16, 64)
    return torch.cat([low, high], dim=-1)


def _unpack6(packed: Tensor) -> Tensor:
    P = packed.shape[0]
    blocks = packed.view(P, -1, 192)
    low = _unpack4(blocks[..., :128].reshape(P, -1))
    high = blocks[..., 128:].reshape(P, -1, PANEL, 2, 2).permute(0, 2, 1, 4, 3)
    fields = torch.stack([high >> 2 * i & 3 for i in range(4)], dim=-2)
    return low | fields.reshape(P, PANEL, -1) << 4


def _pack8(codes: Tensor) -> Tensor:
    return (codes ^ 128).transpose(1, 2).contiguous()


def _unpack8(packed: Tensor) -> Tensor:
    return packed.view(packed.shape[0], -1, PANEL).transpose(1, 2) ^ 128


_LAYOUTS = {4: (_pack4, _unpack4), 6: (_pack6, _unpack6), 8: (_pack8, _unpack8)}

torch.library.define(
    "ptm::wq_linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor values, int bits, int group, "
    "int num_outputs) -> Tensor",
)
torch.library.define(
    "ptm::wq_moe",
    "(Tensor x, Tensor ids, Tensor weights, Tensor codes1, Tensor scale1, Tensor? zero1, "
    "int group1, Tensor codes2, Tensor scale2, Tensor? zero2, Tensor values, int group2, int bits, "
    "int num_inner) -> Tensor",
)


@torch.library.impl("ptm::wq_linear", native.DEVICES)
def _linear(x, codes, scale, zero, values, bits: int, group: int, num_outputs: int):
    x, y = x.contiguous(), _linear_result(x, codes, scale, zero, values, bits, group, num_outputs)
    inputs = x.shape[-1]
    padded = codes.shape[-1] * 8 // bits // PANEL
    assert codes.shape[0] == -(-num_outputs // PANEL) and 0 <= padded - inputs < STEP, codes.shape
    native.call("wq_linear", x, codes, scale, zero, values, y, x.numel() // max(inputs, 1), inputs,
                num_outputs, padded, bits, group, int(scale.dtype is torch.float16),
                int(x.dtype is torch.bfloat16))  # fmt: skip
    return y


@torch.library.register_fake("ptm::wq_linear")
def _linear_result(x, codes, scale, zero, values, bits: int, group: int, num_outputs: int):
    return x.new_empty((*x.shape[:-1], num_outputs))


@torch.library.impl("ptm::wq_moe", native.DEVICES)
def _moe(x, ids, weights, codes1, scale1, zero1, group1: int, codes2, scale2, zero2, values,
         group2: int, bits: int, num_inner: int):  # fmt: skip
    x = x.contiguous()
    y = torch.empty_like(x)
    padded1, padded2 = (c.shape[-1] * 8 // bits // PANEL for c in (codes1, codes2))
    D, E = x.shape[-1], codes1.shape[0]
    assert 0 <= padded1 - D < STEP and 0 <= padded2 - num_inner < STEP, (x.shape, num_inner)
    native.call("wq_moe", x, ids.contiguous(), weights.float().contiguous(), codes1, scale1, zero1,
                codes2, scale2, zero2, values, y, *ids.shape, E, D, num_inner, padded1, padded2,
                bits, group1, group2, int(scale1.dtype is torch.float16),
                int(x.dtype is torch.bfloat16))  # fmt: skip
    return y


@torch.library.register_fake("ptm::wq_moe")
def _moe_result(x, ids, weights, codes1, scale1, zero1, group1: int, codes2, scale2, zero2, values,
                group2: int, bits: int, num_inner: int):  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format)
