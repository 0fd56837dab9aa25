"""One layer of an export: stage by stage, the Hessian of what its linears read, and their codes.

Each rank finds the codes of its own linears (ptm/export/crew.py); `gathered` has those of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ptm.common.errors import CheckpointError, line
from ptm.engine.split import split
from ptm.export.calibrate import Text, share_of
from ptm.export.config import ExportConfig, ExportFormat, Method
from ptm.export.crew import Crew
from ptm.export.stages import Stage
from ptm.export.walk import Walk
from ptm.quant.fake_quant import fake_quant
from ptm.quant.gptq import GptqOptions, Hessian, add_products, factorize, relative_error, solve
from ptm.quant.grid import Grid, Quantized, round_to_nearest
from ptm.quant.pack import Format, to_tensors

Advance = Callable[[str], None]


class Record(NamedTuple):
    """What was found of one linear. rows: that its codes were fitted to; own: of an expert, those
    that it was chosen for; error: relative, of its outputs on calibration text."""

    name: str
    bits: int
    group: int
    error: float | None
    nearest: float | None
    rows: int
    own: int | None
    damping: float | None


def format_of(config: ExportConfig) -> Format:
    """How codes are stored. Without symmetry gptq is gptq_v2: v1 has no zero of 0, and GPTQModel
    refuses such files of others."""
    if config.format is ExportFormat.gptq and not config.symmetric:
        return Format.gptq_v2
    return Format(config.format)


def working_weight(master: Tensor) -> Tensor:
    """What the paged engine's forward has of an fp32 master in bf16: its upper half."""
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    rest = torch.empty_like(master, dtype=torch.int16)
    split(master.clone(), weight, rest)
    return weight.float()


class Layer:
    """One layer: its codes as they are found, on each rank its own."""

    def __init__(
        self,
        config: ExportConfig,
        walk: Walk,
        index: int,
        grids: Mapping[str, Grid],
        advance: Advance,
        crew: Crew,
    ) -> None:
        self.config, self.walk, self.crew = config, walk, crew
        self.index, self.advance = index, advance
        self.prefix = f"model.layers.{index}."
        self.grids = {n: grid for n, grid in grids.items() if n.startswith(self.prefix)}
        self.codes: dict[str, Quantized] = {}
        self.records: list[Record] = []
        self.options = GptqOptions(
            damping=config.damping,
            candidates=config.candidates,
            descents=config.descents,
            alpha=config.alpha,
        )

    def round(self) -> None:
        """Without text: every linear to the nearest codes, of the weights that forwards saw."""
        is_trained = self.config.method is Method.trained
        for i, (name, grid) in enumerate(self.grids.items()):
            if not self.crew.is_mine(i):
                continue
            weight = self._weight(name)
            weight = working_weight(weight) if is_trained else weight
            self._keep(name, round_to_nearest(weight, grid), None, 0, None)

    def calibrate(
        self, rows: list[Tensor], twin_rows: list[Tensor] | None, text: Text
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Quantize by what the inputs are; the rows of the next layer."""
        walk = self.walk
        share = share_of(text.num_tokens, walk.num_experts, walk.experts_per_token)
        stages = walk.stages(
            self.index, rows, text, self.crew, twin_rows=twin_rows, least_rows=share
        )
        try:
            while True:
                self._stage(next(stages))
        except StopIteration as stop:
            return stop.value.rows, stop.value.twin_rows

    def _stage(self, stage: Stage) -> None:
        wanted = {n: w for n, w in stage.linears.items() if self.prefix + n in self.grids}
        if not wanted:
            return
        num_inputs = next(iter(wanted.values())).shape[1]
        mean, num_rows = self._mean(stage, num_inputs)
        cross = self._cross(stage, mean, num_rows)
        mine = wanted
        if stage.shared is not None:
            names = [name for i, name in enumerate(wanted) if self.crew.is_mine(i)]
            mine = {name: wanted[name] for name in names}
        self._solve(mine, mean, num_rows, cross, stage.own_rows)
        if stage.shared is not None:
            for name, weight in self.crew.exchange(mine).items():
                if name not in mine:
                    wanted[name].copy_(weight)

    def _solve(
        self,
        linears: dict[str, Tensor],
        mean_KK: Tensor,
        num_rows: int,
        cross: Tensor | None,
        own: int | None,
    ) -> None:
        """Codes for linears that read the same; their weights become what the codes say."""
        if not linears:
            return
        try:
            factor = factorize(mean_KK, self.options)
        except ValueError as error:
            name = self.prefix + next(iter(linears))
            raise CheckpointError(line("linear", name, f"{error}", "look at the model")) from None
        for name, parameter in linears.items():
            whole = self.prefix + name
            weight, grid = self._weight(whole), self.grids[whole]
            solved = solve(weight, factor, grid, self.options, cross_KK=cross)
            parameter.copy_(solved.quantized.dequantize())
            before = relative_error(weight, fake_quant(weight, grid), factor.mean_KK, solved.power)
            damping = None if solved.damping == self.options.damping else solved.damping
            found = (solved.error, before)
            self._keep(whole, solved.quantized, found, num_rows, own, damping)

    def _mean(self, stage: Stage, num_inputs: int) -> tuple[Tensor, int]:
        """Of the products of all inputs, and how many rows there are."""

        def part(batches: slice) -> Hessian:
            found = Hessian(num_inputs)
            for x in stage.inputs[batches]:
                found.add(x)
            return found

        if stage.shared is None:
            whole = part(slice(None))
        else:
            whole = Hessian(num_inputs)
            whole.sum_KK = self.crew.sum(stage.shared.batches, lambda batches: part(batches).sum_KK)
            whole.num_rows = stage.shared.rows
        return whole.mean(), whole.num_rows

    def _cross(self, stage: Stage, mean_KK: Tensor, num_rows: int) -> Tensor | None:
        """Mean of (wanted - input) input^T, for GPTAQ."""
        wanted, shared = stage.wanted, stage.shared
        if wanted is None:
            return None
        num_inputs = len(mean_KK)

        def part(batches: slice) -> Tensor:
            total = torch.zeros_like(mean_KK)
            for x, y in zip(stage.inputs[batches], wanted[batches]):
                add_products(y.reshape(-1, num_inputs), x.reshape(-1, num_inputs), total)
            return total

        total = part(slice(None)) if shared is None else self.crew.sum(shared.batches, part)
        return total.div_(max(num_rows, 1)).sub_(mean_KK)

    def _weight(self, name: str) -> Tensor:
        return self.walk.read(f"{name}.weight").float()

    def _keep(
        self,
        name: str,
        codes: Quantized,
        errors: tuple[float, float] | None,
        rows: int,
        own: int | None,
        damping: float | None = None,
    ) -> None:
        self.codes[name] = codes
        error, nearest = errors or (None, None)
        grid = codes.grid
        made = Record(name, grid.bits, grid.group, error, nearest, rows, own, damping)
        self.records.append(made)
        self.advance(name)

    def gathered(self) -> tuple[dict[str, dict[str, Tensor]], list[Record]]:
        """Of all linears of the layer, whoever had them: what a file holds, and what was found."""
        format, packed = format_of(self.config), {}
        for name, codes in self.codes.items():
            packed |= {f"{name}.{suffix}": t for suffix, t in to_tensors(codes, format).items()}
        found: dict[str, dict[str, Tensor]] = {name: {} for name in self.grids}
        for key, tensor in self.crew.exchange(packed).items():
            name, _, suffix = key.rpartition(".")
            found[name][suffix] = tensor
        every = [Record(*r) for of_rank in self.crew.peers.gather(self.records) for r in of_rank]
        for record in every:
            if record.name not in self.codes:
                self.advance(record.name)
        place = {name: i for i, name in enumerate(self.grids)}
        return found, sorted(every, key=lambda record: place[record.name])

    def tensors(self, packed: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """All tensors of the layer as the file has them."""
        found: dict[str, Tensor] = {}
        for name in self.walk.names():
            if name.startswith(self.prefix):
                module = name.removesuffix(".weight")
                if module in packed:
                    found |= {f"{module}.{suffix}": t for suffix, t in packed[module].items()}
                else:
                    found[name] = self.walk.read(name).to(self.walk.dtype)
        return found
