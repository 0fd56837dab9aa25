"""Bits and groups for each linear under a size: what a bit less costs, and where it costs least.

    1 every (layer, kind of linear) alone is rounded to 4 and to 8 bits in a model in memory; its
      cost is the KL divergence of the predictions on a few rows from those of the model as it is
    2 a kind's experts share that cost by how much of its error is theirs: their relative error
      times the tokens that chose them; at 4 bits in other groups it grows as that error does
    3 all begin at 4 bits and one scale a row; what lowers the cost most for each byte gets smaller
      groups, 8 bits or 16, until the size is reached

Costs are added up as if each were alone, which is nearly so while they are small. The model, in
bf16, must fit in memory for it. A plan has no weights: in place of 1 and 2 it has what another
model was found to lose by kind of linear (`prior`).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.common.errors import RecipeError, line
from ptm.common.units import format_bytes, parse_bytes
from ptm.export.card import kind_of
from ptm.export.config import AS_IS, ExportFormat, Width
from ptm.export.size import stored_bytes
from ptm.export.verify import parameter_of
from ptm.model.transformer import Transformer
from ptm.quant.grid import Grid, round_to_nearest


class Cost(NamedTuple):
    """Of one linear: KL in nats a token, and bytes."""

    kl: Mapping[Width, float]
    size: Mapping[Width, int]


PRIOR: Mapping[str, Mapping[int, float]] = {
    "q_proj": {4: 3.2e-3, 8: 4.3e-4},
    "k_proj": {4: 3.5e-3, 8: 4.9e-4},
    "v_proj": {4: 3.0e-3, 8: 4.1e-4},
    "o_proj": {4: 3.4e-3, 8: 3.4e-4},
    "gate.query": {4: 6.2e-3, 8: 6.0e-4},
    "gate.key": {4: 3.6e-3, 8: 5.2e-4},
    "gate.value": {4: 2.9e-3, 8: 3.0e-4},
    "experts.w1": {4: 8.6e-4, 8: 9.6e-5},
    "experts.w2": {4: 9.2e-4, 8: 1.6e-4},
}
"""KL of all linears of a kind in a layer by bits, in groups of 128, as `measure` found it on mini
(docs/numbers.md)."""


def prior(
    linears: Mapping[str, tuple[int, int]], grids: Mapping[Width, Grid], format: ExportFormat
) -> dict[str, Cost]:
    """Costs without a model: PRIOR, whatever the layer, shared alike by its experts; groups cost as
    the square of the largest of as many numbers of a Gaussian, 2 ln 2n, which sets their scale."""
    experts = Counter(group_of(name) for name in linears)
    found = {}
    for name, shape in linears.items():
        whole, share = PRIOR[kind_of(name)], 1 / experts[group_of(name)] / math.log(2 * 128)
        kl = {w: whole[w.bits] * share * math.log(2 * (w.group or shape[1])) for w in grids}
        found[name] = Cost({**kl, AS_IS: 0.0}, sizes_of(shape, grids, format))
    return found


def fit(size: str, rest: int, costs: Mapping[str, Cost]) -> dict[str, Width]:
    """The width of each linear for all weights in `size`, of which `rest` bytes are not linears'.

    Raises RecipeError as `check_size`.
    """
    return choose(costs, check_size(size, rest, [cost.size for cost in costs.values()]))


def check_size(size: str, rest: int, sizes: Sequence[Mapping[Width, int]]) -> int:
    """Bytes for the linears, of these sizes each, where `rest` bytes are not linears'.

    Raises RecipeError where that is less than the least of all, or leaves all as they are.
    """
    least, most = (rest + sum(pick(of.values()) for of in sizes) for pick in (min, max))
    wanted = parse_bytes(size, key="size")
    if not least <= wanted < most:
        lowest = f"{least} bytes ({format_bytes(least)}: all at 4 bits, a scale a row)"
        ends = f"{lowest} to less than {most} ({format_bytes(most)}: none quantized)"
        raise RecipeError(line("size", size, f"this model takes {ends}", "give a size between"))
    return wanted - rest


def choose(costs: Mapping[str, Cost], budget: int) -> dict[str, Width]:
    """Widths whose sizes add up to `budget` bytes at most, by steps of least cost.

    Raises ValueError where the smallest of all is larger.
    """
    chosen = {name: min(cost.size, key=lambda w: cost.size[w]) for name, cost in costs.items()}
    used = sum(cost.size[chosen[name]] for name, cost in costs.items())
    if used > budget:
        raise ValueError(f"{used} bytes are needed")
    heap: list[tuple[float, str, Width, Width]] = []

    def offer(name: str) -> None:
        cost, now = costs[name], chosen[name]
        for more, size in cost.size.items():
            added, gain = size - cost.size[now], cost.kl[now] - cost.kl[more]
            if added >= 0 and gain > 0:
                heapq.heappush(heap, (-gain / max(added, 1), name, now, more))

    for name in costs:
        offer(name)
    while heap:
        _, name, before, more = heapq.heappop(heap)
        added = costs[name].size[more] - costs[name].size[before]
        if before == chosen[name] and used + added <= budget:
            used += added
            chosen[name] = more
            offer(name)
    return chosen


@torch.no_grad()
def measure(
    model: Transformer,
    linears: Mapping[str, tuple[int, int]],
    grids: Mapping[Width, Grid],
    format: ExportFormat,
    ids_BL: Tensor,
    documents_BL: Tensor,
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, Cost]:
    """The costs of all linears; the model is as it was afterwards.

    grids: of as many bits the first is put into the model, the others cost by their error beside
    it. Sizes are those in files of `format`, scales and all. One forward for each layer, kind and
    number of bits; `advance` hears of each.
    """
    tried: dict[int, Width] = {}
    for width in grids:
        tried.setdefault(width.bits, width)
    groups: dict[str, list[str]] = {}
    for name in linears:
        groups.setdefault(group_of(name), []).append(name)
    model.train()
    base = list(_log_p(model, ids_BL, documents_BL))
    tokens_LE = model.take_expert_counts()
    model.eval()
    found: dict[str, Cost] = {}
    for names in groups.values():
        errors = {
            (name, width): _error(parameter_of(model, name), grid) * _tokens(name, tokens_LE)
            for name in names
            for width, grid in grids.items()
        }
        of_error = {}  # KL by which a unit of it is paid
        for bits, width in tried.items():
            kept = {name: parameter_of(model, name).clone() for name in names}
            for name, weight in kept.items():
                near = round_to_nearest(weight.float(), grids[width]).dequantize()
                parameter_of(model, name).copy_(near)
            whole = 0.0
            for wanted, log_p in zip(base, _log_p(model, ids_BL, documents_BL), strict=True):
                whole += float(F.kl_div(log_p, wanted, reduction="sum", log_target=True))
            whole = max(whole, 0.0) / ids_BL.numel()
            for name, weight in kept.items():
                parameter_of(model, name).copy_(weight)
            of_error[bits] = whole / (sum(errors[name, width] for name in names) or 1.0)
            advance(f"sensitivity of {names[0]}")
        for name in names:
            kl = {width: of_error[width.bits] * errors[name, width] for width in grids}
            found[name] = Cost({**kl, AS_IS: 0.0}, sizes_of(linears[name], grids, format))
    return found


def group_of(name: str) -> str:
    """A layer's linears of one kind."""
    return f"{name.split('.')[2]}.{kind_of(name)}"


def sizes_of(
    shape: tuple[int, int], grids: Mapping[Width, Grid], format: ExportFormat
) -> dict[Width, int]:
    """Of one linear, by how it is stored."""
    size = {width: stored_bytes(*shape, grid, format) for width, grid in grids.items()}
    return {**size, AS_IS: 2 * shape[0] * shape[1]}


def _log_p(model: Transformer, ids_BL: Tensor, documents_BL: Tensor) -> Iterator[Tensor]:
    """Of a row each, (L, V): more at a time is fresh memory at every step."""
    for ids, documents in zip(ids_BL.split(2), documents_BL.split(2)):
        for logits_LV in model(ids, document_ids_BL=documents):
            yield torch.log_softmax(logits_LV.float(), -1)


def _error(weight: Tensor, grid: Grid) -> float:
    wide = weight.float()
    gap = (round_to_nearest(wide, grid).dequantize() - wide).square().sum()
    return float(gap / wide.square().sum().clamp(min=1e-30))


def _tokens(name: str, tokens_LE: Tensor) -> int:
    parts = name.split(".")
    if "experts" not in parts:
        return 1
    expert = int(parts[parts.index("experts") + 1])
    return max(1, int(tokens_LE[int(parts[2]), expert]))  # unseen here, not elsewhere
