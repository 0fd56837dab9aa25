"""Bits for each linear under a size: what a bit less costs, and where it costs least.

    1 every (layer, kind of linear) alone is rounded to 4 and to 8 bits in a model in memory; its
      cost is the KL divergence of the predictions on a few rows from those of the model as it is
    2 a kind's experts share that cost by how much of its error is theirs: their relative error
      times the tokens that chose them
    3 all begin at 4 bits; what lowers the cost most for each byte becomes 8 bits, then 16, until
      the size is reached

Costs are added up as if each were alone, which is nearly so while they are small. The model, in
bf16, must fit in memory for it. A plan has no weights: in place of 1 and 2 it has what another
model was found to lose by kind of linear (`prior`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ptm.common.errors import RecipeError, line
from ptm.common.units import format_bytes, parse_bytes
from ptm.export.card import kind_of
from ptm.export.config import ExportFormat
from ptm.export.quantize import BF16
from ptm.export.size import stored_bytes
from ptm.export.verify import parameter_of
from ptm.model.transformer import Transformer
from ptm.quant.grid import Grid, Quantized, round_to_nearest


class Cost(NamedTuple):
    """Of one linear: bits -> KL in nats a token, and bytes; 16 is as it is."""

    kl: Mapping[int, float]
    size: Mapping[int, int]


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
"""KL of all linears of a kind in a layer, as `measure` found it on mini (docs/numbers.md)."""


def prior(
    linears: Mapping[str, tuple[int, int]], grids: Mapping[int, Grid], format: ExportFormat
) -> dict[str, Cost]:
    """Costs without a model: PRIOR, whatever the layer, shared alike by its experts."""
    experts = Counter(_group(name) for name in linears)
    found = {}
    for name, shape in linears.items():
        whole = PRIOR[kind_of(name)]
        kl = {bits: whole[bits] / experts[_group(name)] for bits in grids}
        found[name] = Cost({**kl, BF16: 0.0}, _sizes(shape, grids, format))
    return found


def fit(size: str, rest: int, costs: Mapping[str, Cost]) -> dict[str, int]:
    """Bits of each linear for all weights in `size`, of which `rest` bytes are not linears'.

    Raises RecipeError where the size is less than all at the fewest bits, or leaves all at 16.
    """
    least, most = (rest + sum(pick(c.size.values()) for c in costs.values()) for pick in (min, max))
    wanted = parse_bytes(size, key="size")
    if not least <= wanted < most:
        ends = f"{format_bytes(least)} (all at 4 bits) to {format_bytes(most)} (none quantized)"
        raise RecipeError(line("size", size, f"this model takes {ends}", "give a size between"))
    return choose_bits(costs, wanted - rest)


def choose_bits(costs: Mapping[str, Cost], budget: int) -> dict[str, int]:
    """Bits of each linear whose sizes add up to `budget` bytes at most, by steps of least cost.

    Raises ValueError where the smallest of all is larger.
    """
    bits = {name: min(cost.size) for name, cost in costs.items()}
    used = sum(cost.size[bits[name]] for name, cost in costs.items())
    if used > budget:
        raise ValueError(f"{used} bytes are needed")
    heap: list[tuple[float, str, int]] = []

    def offer(name: str) -> None:
        cost, now = costs[name], bits[name]
        for more in sorted(b for b in cost.size if b > now):
            added = cost.size[more] - cost.size[now]
            gain = cost.kl[now] - cost.kl[more]
            if gain > 0:
                heapq.heappush(heap, (-gain / max(added, 1), name, more))

    for name in costs:
        offer(name)
    while heap:
        _, name, more = heapq.heappop(heap)
        added = costs[name].size[more] - costs[name].size[bits[name]]
        if more > bits[name] and used + added <= budget:
            used += added
            bits[name] = more
            offer(name)
    return bits


@torch.no_grad()
def measure(
    model: Transformer,
    linears: Mapping[str, tuple[int, int]],
    grids: Mapping[int, Grid],
    format: ExportFormat,
    ids_BL: Tensor,
    documents_BL: Tensor,
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, Cost]:
    """The costs of all linears; the model is as it was afterwards.

    grids: bits -> grid; sizes are those in files of `format`, scales and all. One forward for
    each layer, kind and grid; `advance` hears of each.
    """
    groups: dict[str, list[str]] = {}
    for name in linears:
        groups.setdefault(_group(name), []).append(name)
    model.train()
    base = _log_p(model, ids_BL, documents_BL)
    tokens_LE = model.take_expert_counts()
    model.eval()
    found: dict[str, Cost] = {}
    for names in groups.values():
        whole, shares = {}, {}
        for bits, grid in grids.items():
            kept, errors = {}, {}
            for name in names:
                weight = parameter_of(model, name)
                kept[name] = weight.clone()
                codes = round_to_nearest(weight.float(), grid)
                errors[name] = _error(weight, codes) * _tokens(name, tokens_LE)
                weight.copy_(codes.dequantize())
            log_p = _log_p(model, ids_BL, documents_BL)
            whole[bits] = float((base.exp() * (base - log_p)).sum(-1).mean().clamp(min=0))
            for name, weight in kept.items():
                parameter_of(model, name).copy_(weight)
            total = sum(errors.values()) or 1.0
            shares[bits] = {name: error / total for name, error in errors.items()}
            advance(f"sensitivity of {names[0]}")
        for name in names:
            kl = {bits: whole[bits] * shares[bits][name] for bits in grids}
            found[name] = Cost({**kl, BF16: 0.0}, _sizes(linears[name], grids, format))
    return found


def _group(name: str) -> str:
    """A layer's linears of one kind."""
    return f"{name.split('.')[2]}.{kind_of(name)}"


def _sizes(
    shape: tuple[int, int], grids: Mapping[int, Grid], format: ExportFormat
) -> dict[int, int]:
    size = {bits: stored_bytes(*shape, grid, format) for bits, grid in grids.items()}
    return {**size, BF16: 2 * shape[0] * shape[1]}


def _log_p(model: Transformer, ids_BL: Tensor, documents_BL: Tensor) -> Tensor:
    rows = []
    for ids, documents in zip(ids_BL.split(4), documents_BL.split(4)):
        logits = model(ids, document_ids_BL=documents)
        rows.append(torch.log_softmax(logits.flatten(0, 1).float(), -1))
    return torch.cat(rows)


def _error(weight: Tensor, codes: Quantized) -> float:
    wide = weight.float()
    gap = (codes.dequantize() - wide).square().sum()
    return float(gap / wide.square().sum().clamp(min=1e-30))


def _tokens(name: str, tokens_LE: Tensor) -> int:
    parts = name.split(".")
    if "experts" not in parts:
        return 1
    expert = int(parts[parts.index("experts") + 1])
    return int(tokens_LE[int(parts[2]), expert])
