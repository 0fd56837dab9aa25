"""Bit layouts of quantized weights in files: what each format stores for one linear, both ways.

    gptq, gptq_v2       NAME.qweight  int32 (K/p, N)    codes of inputs r p ... r p + p-1 in row r
                        NAME.qzeros   int32 (G, N/p)    zero points along N; `gptq` stores zero - 1
                        NAME.scales   fp16  (G, N)
                        NAME.g_idx    int32 (K,)        group of each input
    compressed-tensors  NAME.weight_packed      int32 (N, K/p)   codes along K
                        NAME.weight_scale       (N, G)
                        NAME.weight_shape       int64 (2,)       N, K
                        NAME.weight_zero_point  int32 (N/p, G)   where not symmetric, along N
    fp6                 NAME.weight_low   int32 (N/64, K/16, 32, 4)   four low bits of each code
                        NAME.weight_high  int32 (N/64, K/16, 32, 2)   sign and top exponent bit
                        NAME.weight_scale (N, G)
                        NAME.weight_shape int64 (2,)

p = 32 / bits; of the codes in one int32 the first has the lowest bits. Inputs and outputs that do
not fill the last word are padded with code 0, which only compressed-tensors and fp6 can say (they
store the shape); the others need K and N that divide.

fp6 is the 4+2 split of TC-FPx (arXiv 2401.14112), laid out for mma.m16n8k16 with weights as the
first operand: a slab is 64 outputs x 16 inputs, four tiles of 16 x 16. Lane l = 4 g + t of a warp
holds of each tile the eight codes at rows (g, g, g+8, g+8, g, g, g+8, g+8) and columns 2 t +
(0, 1, 0, 1, 8, 9, 8, 9), in that order. So a lane loads 16 bytes of low bits (a word a tile, code
j at bit 4 j) and 8 bytes of high bits (two tiles a word, code j of the first at bit 2 j), aligned
and next to its neighbours'.

Unpacking refuses words that cannot be: a wrong shape, a group index out of order. Sources:
AutoGPTQ and GPTQModel (their `gptq` and `gptq_v2`), vLLM's compressed-tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptm.common.config import Choice
from ptm.quant.grid import Grid, Quantized

SLAB_ROWS, SLAB_COLUMNS = 64, 16


class Format(Choice):
    """How codes lie in the files of an export."""

    gptq = "gptq"
    gptq_v2 = "gptq_v2"
    compressed_tensors = "compressed-tensors"
    fp6 = "fp6"


MARKS = {
    Format.gptq: "qweight",
    Format.gptq_v2: "qweight",
    Format.compressed_tensors: "weight_packed",
    Format.fp6: "weight_low",
}
"""Of the tensors of a linear, the one that tells that it is quantized."""


def pack_words(codes: Tensor, bits: int, dim: int) -> Tensor:
    """uint8 codes into int32 words along `dim` of two, the first code lowest; padded with zeros."""
    per_word = 32 // bits
    rows = codes.movedim(dim, -1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % per_word))
    parts = rows.reshape(rows.shape[0], -1, per_word).long()
    shifts = torch.arange(0, 32, bits, device=codes.device)
    words = (parts << shifts).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.movedim(-1, dim).contiguous()


def unpack_words(words: Tensor, bits: int, dim: int, count: int) -> Tensor:
    """The first `count` codes along `dim`: the inverse of `pack_words`."""
    rows = words.movedim(dim, -1).long()
    shifts = torch.arange(0, 32, bits, device=words.device)
    codes = (rows.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count].to(torch.uint8).movedim(-1, dim).contiguous()


def to_tensors(q: Quantized, format: Format) -> dict[str, Tensor]:
    """What a file stores for one linear, by suffix.

    Raises ValueError where the format cannot say it: sizes that do not divide, another grid.
    """
    N, K = q.codes_NK.shape
    bits, per_word = q.grid.bits, 32 // q.grid.bits
    if (format is Format.fp6) == q.grid.is_int:
        raise ValueError(f"format {format} does not hold {q.grid.kind}")
    if format is Format.fp6:
        low, high = _split_fp6(q.codes_NK)
        shape = torch.tensor([N, K])
        scale = q.scale_NG.contiguous()
        return {"weight_low": low, "weight_high": high, "weight_scale": scale,
                "weight_shape": shape}  # fmt: skip
    if format is Format.compressed_tensors:
        found = {
            "weight_packed": pack_words(q.codes_NK, bits, 1),
            "weight_scale": q.scale_NG.contiguous(),
            "weight_shape": torch.tensor([N, K]),
        }
        if q.zero_NG is not None:
            found["weight_zero_point"] = pack_words(q.zero_NG, bits, 0)
        return found
    if K % per_word or N % per_word:
        raise ValueError(f"{N} x {K} must divide by {per_word} to pack {bits} bits")
    zero = q.zero_NG
    if zero is None:
        zero = torch.full(q.scale_NG.shape, q.grid.middle, dtype=torch.uint8)
    if format is Format.gptq:
        zero = (zero.int() - 1).bitwise_and(2**bits - 1).to(torch.uint8)
    size = q.grid.group or K
    return {
        "qweight": pack_words(q.codes_NK.t(), bits, 0),
        "qzeros": pack_words(zero.t(), bits, 1),
        "scales": q.scale_NG.t().contiguous(),
        "g_idx": (torch.arange(K) // size).to(torch.int32),
    }


def from_tensors(
    tensors: dict[str, Tensor], grid: Grid, format: Format
) -> tuple[Quantized, Tensor | None]:
    """The inverse of `to_tensors`, and the order of inputs where g_idx scatters them.

    With an order, column j of the codes is input order[j]: groups of such a file are not runs of
    inputs, so the codes come sorted by group. Raises ValueError where the tensors do not belong
    together.
    """
    if format is Format.fp6:
        N, K = _shape(tensors)
        codes = _join_fp6(tensors["weight_low"], tensors["weight_high"], N, K)
        return Quantized(grid, codes, _scales(tensors["weight_scale"], N, K, grid)), None
    if format is Format.compressed_tensors:
        N, K = _shape(tensors)
        words = _shaped(tensors["weight_packed"], (N, -(-K * grid.bits // 32)), "weight_packed")
        zero = None
        if not grid.is_symmetric:
            per_word = 32 // grid.bits
            wanted = (-(-N // per_word), grid.num_groups(K))
            packed = _shaped(tensors["weight_zero_point"], wanted, "weight_zero_point")
            zero = unpack_words(packed, grid.bits, 0, N)
        scale = _scales(tensors["weight_scale"], N, K, grid)
        codes = unpack_words(words, grid.bits, 1, K)
        if (order := _order(tensors.get("weight_g_idx"), K, grid)) is not None:
            codes = codes[:, order].contiguous()
        return Quantized(grid, codes, scale, zero), order
    per_word = 32 // grid.bits
    words = tensors["qweight"]
    K, N = words.shape[0] * per_word, words.shape[1]
    scale = _scales(tensors["scales"].t(), N, K, grid)
    packed = _shaped(tensors["qzeros"], (scale.shape[1], N // per_word), "qzeros")
    zero = unpack_words(packed, grid.bits, 1, N).t().contiguous()
    if format is Format.gptq:
        zero = (zero.int() + 1).bitwise_and(2**grid.bits - 1).to(torch.uint8)
    codes = unpack_words(words, grid.bits, 0, K).t().contiguous()
    if (order := _order(tensors.get("g_idx"), K, grid)) is not None:
        codes = codes[:, order].contiguous()
    if grid.is_symmetric:
        if not bool((zero == grid.middle).all()):
            raise ValueError("sym=true, and zero points are not those of a symmetric grid")
        zero = None
    return Quantized(grid, codes, scale, zero), order


def _order(g_idx: Tensor | None, num_inputs: int, grid: Grid) -> Tensor | None:
    """Inputs sorted by group, or None where they are already."""
    if g_idx is None:
        return None
    size = grid.group or num_inputs
    g_idx = _shaped(g_idx, (num_inputs,), "g_idx").long()
    expected = torch.arange(num_inputs) // size
    if torch.equal(g_idx, expected):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], expected):
        raise ValueError(f"g_idx does not put {size} inputs into each group")
    return order


def _shape(tensors: dict[str, Tensor]) -> tuple[int, int]:
    N, K = _shaped(tensors["weight_shape"], (2,), "weight_shape").tolist()
    if not (0 < N < 2**31 and 0 < K < 2**31):
        raise ValueError(f"weight_shape {N} x {K} is no shape")
    return N, K


def _scales(scale: Tensor, N: int, K: int, grid: Grid) -> Tensor:
    found = _shaped(scale, (N, grid.num_groups(K)), "scales").contiguous()
    if not bool(found.isfinite().all()):
        raise ValueError("a scale is not finite")
    return found


def _shaped(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} and needs {shape}")
    return tensor


def _lanes() -> tuple[Tensor, Tensor]:
    """Row and column in a tile of code j of lane l, each (32, 8)."""
    lane = torch.arange(32).unsqueeze(1)
    rows = (lane >> 2) + torch.tensor([0, 0, 8, 8, 0, 0, 8, 8])
    columns = 2 * (lane & 3) + torch.tensor([0, 1, 0, 1, 8, 9, 8, 9])
    return rows, columns


def _split_fp6(codes_NK: Tensor) -> tuple[Tensor, Tensor]:
    N, K = codes_NK.shape
    padded = torch.nn.functional.pad(codes_NK, (0, -K % SLAB_COLUMNS, 0, -N % SLAB_ROWS))
    slabs = padded.view(-(-N // SLAB_ROWS), 4, 16, -(-K // SLAB_COLUMNS), 16)
    rows, columns = _lanes()
    # (slab row, tile, slab column, lane, code) -> (slab row, slab column, lane, tile, code)
    ours = slabs.permute(0, 1, 3, 2, 4)[:, :, :, rows, columns].permute(0, 2, 3, 1, 4)
    flat = ours.reshape(-1, 8)
    low = pack_words(flat & 15, 4, 1).view(*ours.shape[:4])
    pairs = (ours >> 4).reshape(-1, 16)
    high = pack_words(pairs, 2, 1).view(*ours.shape[:3], 2)
    return low.contiguous(), high.contiguous()


def _join_fp6(low: Tensor, high: Tensor, N: int, K: int) -> Tensor:
    across, down = -(-N // SLAB_ROWS), -(-K // SLAB_COLUMNS)
    _shaped(low, (across, down, 32, 4), "weight_low")
    _shaped(high, (across, down, 32, 2), "weight_high")
    lows = unpack_words(low.reshape(-1, 1), 4, 1, 8).view(across, down, 32, 4, 8)
    highs = unpack_words(high.reshape(-1, 1), 2, 1, 16).view(across, down, 32, 4, 8)
    codes = (highs << 4) | lows
    slabs = torch.empty(across, 4, down, 16, 16, dtype=torch.uint8)
    rows, columns = _lanes()
    slabs[:, :, :, rows, columns] = codes.permute(0, 3, 1, 2, 4)
    whole = slabs.permute(0, 1, 3, 2, 4).reshape(across * SLAB_ROWS, down * SLAB_COLUMNS)
    return whole[:N, :K].contiguous()
