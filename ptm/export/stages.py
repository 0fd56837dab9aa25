"""One layer of M32 as stages: what its linears read, in the order in which they are quantized.

    x -- norm -- n -- LFA -- z -- {q_proj, k_proj}
                 `-- {v_proj}         attend -- {o_proj} -- + x -- norm -- m -- {router}
         m of its tokens -- {w1 of an expert} -- silu(gate) up -- {w2 of it}     -- weighted, + x

`stages` is a generator. It yields a Stage and waits: whoever asked writes the quantized weights
over the layer's, and what comes after reads what they give. Every part is computed once, so a layer
costs about one forward. It returns the rows for the next layer.

Of several ranks (ptm/export/crew.py) each goes through the same stages with its own rows, and then
through those of its own experts; between the two, and at the end, all have all rows.

With a twin (the layer as it was, and rows that only such layers made) each stage also has what its
linears would read in the whole model, for GPTAQ.

An expert that fewer than `least_rows` tokens chose is shown others, evenly spaced in the text,
until it has that many: its weights are fitted to what it may meet, and the stage says how many were
its own.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.export.crew import Crew
from ptm.model.block import Block
from ptm.model.context import Context
from ptm.model.router import Routing


class Shared(NamedTuple):
    """A text of which every rank has its own batches: how many there are, and rows in them."""

    batches: int
    rows: int


class Stage(NamedTuple):
    """Linears that read the same rows.

    linears: name in the layer -> its weight (N, K), to be written over; inputs: batches of rows
    (..., K); wanted: the twin's, alike; own_rows: of an expert's rows those that it was chosen for;
    shared: where other ranks have this stage too, with other rows. Then all write the weights.
    """

    linears: dict[str, Tensor]
    inputs: list[Tensor]
    wanted: list[Tensor] | None = None
    own_rows: int | None = None
    shared: Shared | None = None


class Twin(NamedTuple):
    """A layer that is not quantized, and its rows."""

    block: Block
    rows: list[Tensor]


class Done(NamedTuple):
    """Rows for the next layer; those of the twin; how many tokens chose each expert, (E,)."""

    rows: list[Tensor]
    twin_rows: list[Tensor] | None
    counts_E: Tensor


@torch.no_grad()
def stages(
    block: Block,
    rows: list[Tensor],
    contexts: list[Context],
    *,
    crew: Crew | None = None,
    twin: Twin | None = None,
    router_bias_E: Tensor | None = None,
    least_rows: int = 0,
) -> Generator[Stage, None, Done]:
    """Shapes: rows are batches (B, L, D) with a context each."""
    attention, gate = block.self_attn, block.mlp.gate
    crew = crew or Crew()
    mine, shared = crew.batches(len(rows)), shared_by(rows)
    contexts = contexts[mine]
    normed, filtered = _filtered(block, rows[mine], contexts)
    twin_normed, twin_filtered = (
        (None, None) if twin is None else _filtered(twin.block, twin.rows[mine], contexts)
    )
    weights = {f"{name}_proj": getattr(attention, f"{name}_proj").weight.data for name in "qkvo"}

    def of(*names: str) -> dict[str, Tensor]:
        return {f"self_attn.{name}": weights[name] for name in names}

    yield Stage(of("q_proj", "k_proj"), filtered, twin_filtered, shared=shared)
    yield Stage(of("v_proj"), normed, twin_normed, shared=shared)
    heads = [attention.attend(z, n, c) for z, n, c in zip(filtered, normed, contexts)]
    twin_heads = None
    if twin is not None and twin_filtered is not None and twin_normed is not None:
        parts = zip(twin_filtered, twin_normed, contexts)
        twin_heads = [twin.block.self_attn.attend(z, n, c) for z, n, c in parts]
    yield Stage(of("o_proj"), heads, twin_heads, shared=shared)
    rows = crew.join([x + attention.o_proj(h) for x, h in zip(rows[mine], heads)])
    normed = [block.post_attention_layernorm(x) for x in rows]
    twin_rows = twin_normed = None
    if twin is not None and twin_heads is not None:
        own = zip(twin.rows[mine], twin_heads)
        twin_rows = crew.join([x + twin.block.self_attn.o_proj(h) for x, h in own])
        twin_normed = [twin.block.post_attention_layernorm(x) for x in twin_rows]

    parts = {f".{name}": part for name, part in gate.named_children()} or {"": gate}
    router = {f"mlp.gate{name}": _weight(part) for name, part in parts.items()}
    twin_mine = None if twin_normed is None else twin_normed[mine]
    yield Stage(router, normed[mine], twin_mine, shared=shared)
    x_TD = _flat(normed)
    routing: Routing = gate(x_TD) if router_bias_E is None else gate(x_TD, router_bias_E)
    twin_TD = None if twin_normed is None else _flat(twin_normed)
    y_TD = yield from _experts(block, x_TD, routing, twin, twin_TD, least_rows, crew)
    rows = [x + y.view_as(x) for x, y in zip(rows, y_TD.split([x[..., 0].numel() for x in rows]))]
    if twin is not None and twin_rows is not None and twin_mine is not None:
        mixed = [twin.block.mlp(n, None, router_bias_E).y_BLD for n in twin_mine]
        twin_rows = crew.join([x + y for x, y in zip(twin_rows[mine], mixed)])
    return Done(rows, twin_rows, routing.counts_E)


def _experts(
    block: Block,
    x_TD: Tensor,
    routing: Routing,
    twin: Twin | None,
    twin_TD: Tensor | None,
    least_rows: int,
    crew: Crew,
) -> Generator[Stage, None, Tensor]:
    """The experts one after another, on each rank its own; returns their weighted sum (T, D)."""
    experts = block.mlp.experts
    y_TD = torch.zeros_like(x_TD)
    for now, mine in crew.rounds(routing.counts_E):
        given = {}
        for e in mine:
            token, place = (routing.ids_TA == e).nonzero(as_tuple=True)
            own = len(token)
            shown = torch.cat([token, stand_ins(token, len(x_TD), least_rows - own)])
            rows = x_TD[shown]
            wanted = None if twin_TD is None else twin_TD[shown]
            yield Stage({f"mlp.experts.{e}.w1": experts.w1.data[e]}, [rows], _or_none(wanted), own)
            rows = _swiglu(rows, experts.w1[e])
            if wanted is not None and twin is not None:
                wanted = _swiglu(wanted, twin.block.mlp.experts.w1[e])
            yield Stage({f"mlp.experts.{e}.w2": experts.w2.data[e]}, [rows], _or_none(wanted), own)
            weight = routing.weights_TA[token, place].to(x_TD.dtype).unsqueeze(1)
            given[str(e)] = F.linear(rows[:own], experts.w2[e]) * weight
        given = crew.exchange(given)
        for e in now:
            token = (routing.ids_TA == e).nonzero(as_tuple=True)[0]
            y_TD.index_add_(0, token, given[str(e)])
    return y_TD


def shared_by(rows: list[Tensor]) -> Shared:
    """Of all batches (..., D)."""
    return Shared(len(rows), sum(x[..., 0].numel() for x in rows))


def _filtered(
    block: Block, rows: list[Tensor], contexts: list[Context]
) -> tuple[list[Tensor], list[Tensor]]:
    normed = [block.input_layernorm(x) for x in rows]
    return normed, [block.self_attn.filter(n, c) for n, c in zip(normed, contexts)]


def stand_ins(own: Tensor, num_tokens: int, missing: int) -> Tensor:
    """Tokens that others chose, evenly spaced, `missing` of them or as many as there are."""
    if missing <= 0:
        return own[:0]
    is_other = torch.ones(num_tokens, dtype=torch.bool)
    is_other[own] = False
    others = is_other.nonzero().squeeze(1)
    count = min(missing, len(others))
    return others[torch.arange(count) * len(others) // max(count, 1)]


def _weight(linear: torch.nn.Module) -> Tensor:
    assert isinstance(linear.weight, Tensor)
    return linear.weight.data


def _swiglu(x: Tensor, w1: Tensor) -> Tensor:
    gate, up = F.linear(x, w1).chunk(2, dim=-1)
    return F.silu(gate) * up


def _flat(rows: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in rows])


def _or_none(rows: Tensor | None) -> list[Tensor] | None:
    return None if rows is None else [rows]
