"""Quantized linears as a source of tensors: `NAME.weight` in place of its codes, in exact fp32.

    QuantSource(source, config)     names() has NAME.weight for every packed linear
        .read("NAME.weight")        what the codes stand for; other tensors widened to fp32
        .quantized("NAME")          the codes themselves, for quantized inference

One linear is unpacked at a time. Everything is fp32, because a tensor of ours may be made of
linears that were quantized and others that were not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptm.checkpoint.quant_config import QuantConfig
from ptm.checkpoint.source import TensorInfo, TensorSource
from ptm.common.errors import CheckpointError, line
from ptm.quant.grid import Quantized
from ptm.quant.pack import MARKS, Format, from_tensors

_SUFFIXES = {
    Format.gptq: ("qweight", "qzeros", "scales", "g_idx"),
    Format.gptq_v2: ("qweight", "qzeros", "scales", "g_idx"),
    Format.compressed_tensors: (
        "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"
    ),
    Format.fp6: ("weight_low", "weight_high", "weight_scale", "weight_shape"),
}  # fmt: skip
PACKED_BITS = (2, 4, 8)
_OPTIONAL = {"g_idx", "weight_zero_point", "weight_g_idx"}


class QuantSource:
    """Raises CheckpointError, naming the linear, where its tensors do not belong together."""

    def __init__(self, source: TensorSource, config: QuantConfig) -> None:
        self.source, self.config = source, config
        mark, names = "." + MARKS[config.format], source.names()
        self._there = set(names)
        self.modules = [name.removesuffix(mark) for name in names if name.endswith(mark)]
        hidden = {f"{m}.{s}" for m in self.modules for s in _SUFFIXES[config.format]}
        self._plain = [name for name in names if name not in hidden]
        self._infos = {f"{m}.weight": self._info_of(m) for m in self.modules}
        self._last: tuple[str, Tensor] | None = None
        if twice := sorted(set(self._plain) & set(self._infos)):
            raise CheckpointError(
                line("tensor", twice[0], "is there quantized too", "remove one of them")
            )

    def names(self) -> list[str]:
        return [*self._plain, *self._infos]

    def info(self, name: str) -> TensorInfo:
        if name in self._infos:
            return self._infos[name]
        return self.source.info(name)._replace(dtype=torch.float32)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self._infos:
            return self.source.read(name, start, stop).float()
        if self._last is None or self._last[0] != name:
            self._last = name, self._dequantize(name.removesuffix(".weight"))
        whole = self._last[1]
        return whole[start : len(whole) if stop is None else stop].clone()

    def quantized(self, module: str) -> tuple[Quantized, Tensor | None]:
        """Codes of a linear, and the order of its inputs where its groups scatter them."""
        tensors = {}
        for suffix in _SUFFIXES[self.config.format]:
            name = f"{module}.{suffix}"
            if name in self._there:
                tensors[suffix] = self.source.read(name)
            elif suffix not in _OPTIONAL:
                raise CheckpointError(line("tensor", name, "is missing", "get the folder again"))
        try:
            found = from_tensors(tensors, self.config.grid_of(module), self.config.format)
            if self.config.is_sequential and found[1] is not None:
                raise ValueError("desc_act=false, and g_idx scatters its inputs over the groups")
            return found
        except (ValueError, KeyError) as error:
            rule = f"is not packed as its config.json says ({error})"
            raise CheckpointError(line("tensor", module, rule, "get the folder again")) from None

    def _dequantize(self, module: str) -> Tensor:
        q, order = self.quantized(module)
        near = q.dequantize()
        if order is None:
            return near
        found = torch.empty_like(near)
        found[:, order] = near
        return found

    def _info_of(self, module: str) -> TensorInfo:
        grid, format = self.config.grid_of(module), self.config.format
        if format in (Format.gptq, Format.gptq_v2):
            shape = self.source.info(f"{module}.qweight").shape
            if len(shape) != 2:
                rule = f"has shape {shape} and needs two dims"
                raise CheckpointError(line("tensor", f"{module}.qweight", rule, "get it again"))
            self._check_bits(module, shape[1])
            return TensorInfo((shape[1], shape[0] * 32 // grid.bits), torch.float32)
        name = f"{module}.weight_shape"
        stored = self.source.info(name) if name in self._there else None
        if stored is None or stored.shape != (2,):
            raise CheckpointError(line("tensor", name, "must be two numbers", "get it again"))
        shape = tuple(int(n) for n in self.source.read(name).tolist())
        if min(shape) < 1 or math.prod(shape) >= 2**40:
            raise CheckpointError(line("tensor", name, f"says {shape}", "get it again"))
        return TensorInfo(shape, torch.float32)

    def _check_bits(self, module: str, num_outputs: int) -> None:
        """Zero points are packed along outputs, whose number is known: their words tell the bits,
        whatever config.json says."""
        bits, name = self.config.grid_of(module).bits, f"{module}.qzeros"
        words = self.source.info(name).shape[-1:] if name in self._there else ()
        for stored in PACKED_BITS:
            if stored != bits and words == (num_outputs * stored // 32,):
                rule = f"the shapes of {module} are those of {stored} bits"
                remedy = f"set bits to {stored} in config.json, or get the folder again"
                raise CheckpointError(line("config.json bits", bits, rule, remedy))
