"""One layer of an ordinary model in plain torch, as the stages in which it is quantized.

    x -- norm -- n -- {q, k, v}  attention -- {o} -- + x
      -- norm -- m -- {gate, up} -- {down} -- + x
                 m of an expert's tokens -- {gate, up of it} -- {down of it} -- weighted, + x

As ptm/export/stages.py does for M32: `stages` yields what linears read, whoever asked writes the
quantized weights over the layer's, and what comes after reads what they give; each part is computed
once, and of several ranks each has its own rows and experts. Rows are whole, so attention sees
everything before a token. Compared with transformers in tests/export/test_ordinary_layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.checkpoint.source import TensorSource
from ptm.export.crew import Crew
from ptm.export.ordinary_config import Ordinary
from ptm.export.stages import Done, Shared, Stage, shared_by, stand_ins
from ptm.kernels.linear import is_widened, linear, widen
from ptm.kernels.rmsnorm import rms_norm
from ptm.model.router import Routing

CHUNK = 1024


class Layer:
    """The weights of one layer in one dtype, and what they compute."""

    def __init__(self, model: Ordinary, source: TensorSource, index: int, dtype: torch.dtype):
        self.model, self.index = model, index
        prefix = f"model.layers.{index}."
        names = model.layer_shapes(index)
        self.weights = {name: source.read(prefix + name).to(dtype) for name in names}

    def norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.model.norm_eps)

    def normed(self, name: str, x: Tensor) -> Tensor:
        return self.norm(f"{name}_layernorm", x)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Some rows at a time where products of bf16 are made in fp32."""
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        if not is_widened(x):
            return F.linear(x, weight, bias)
        found = x.new_empty(*x.shape[:-1], len(weight))
        for rows, out in zip(x.flatten(0, -2).split(CHUNK), found.flatten(0, -2).split(CHUNK)):
            out.copy_(linear(rows, weight, bias))
        return found

    def attend(self, n_BLD: Tensor) -> Tensor:
        """What o_proj reads, (B, L, H x K)."""
        model, (B, L, _) = self.model, n_BLD.shape
        q, k, v = (
            self.linear(f"self_attn.{part}_proj", n_BLD).view(B, L, -1, model.head_dim)
            for part in "qkv"
        )
        if "self_attn.q_norm.weight" in self.weights:
            q, k = self.norm("self_attn.q_norm", q), self.norm("self_attn.k_norm", k)
        cos, sin = _angles(model, L, n_BLD.dtype)
        q, k, v = _rotate(q, cos, sin).transpose(1, 2), _rotate(k, cos, sin), v.transpose(1, 2)
        heads = F.scaled_dot_product_attention(
            widen(q), widen(k.transpose(1, 2)), widen(v), is_causal=True, enable_gqa=True
        )
        return heads.to(n_BLD.dtype).transpose(1, 2).reshape(B, L, -1)

    def active(self, prefix: str, names: tuple[str, str, str], x: Tensor) -> Tensor:
        """What the down projection reads; some rows at a time, as both halves are large."""
        gate, up = (prefix + name for name in names[:2])
        found = x.new_empty(*x.shape[:-1], len(self.weights[f"{gate}.weight"]))
        for rows, out in zip(x.split(CHUNK), found.split(CHUNK)):
            torch.mul(F.silu(self.linear(gate, rows), inplace=True), self.linear(up, rows), out=out)
        return found

    def route(self, x_TD: Tensor) -> Routing:
        model = self.model
        scores = self.linear(f"{model.moe}.gate", x_TD).float().softmax(-1)
        weights, ids = scores.topk(model.experts_per_token, dim=-1)
        if model.is_renormalized:
            weights = weights / weights.sum(-1, keepdim=True)
        counts = torch.bincount(ids.flatten(), minlength=model.num_experts)
        return Routing(ids, weights, counts, scores)

    def mlp(self, x: Tensor) -> Tensor:
        """Of normed rows (..., D), the whole of what is added to them."""
        rows = [x.flatten(0, -2)]
        return _whole(_mlp_stages([self], [rows], 0, Crew(), shared_by(rows)))[0][0][0].view_as(x)


class Twin(NamedTuple):
    """A layer that is not quantized, and its rows."""

    layer: Layer
    rows: list[Tensor]


@torch.no_grad()
def stages(
    layer: Layer,
    rows: list[Tensor],
    *,
    crew: Crew | None = None,
    twin: Twin | None = None,
    least_rows: int = 0,
) -> Generator[Stage, None, Done]:
    """Shapes: rows are batches (B, L, D). They are taken: those of the next layer are made in their
    place, and their lists are empty afterwards."""
    sides = [layer] if twin is None else [layer, twin.layer]
    crew, shared = crew or Crew(), shared_by(rows)
    mine = crew.batches(len(rows))
    both = [rows[mine]] if twin is None else [rows[mine], twin.rows[mine]]
    for taken in (rows, *([] if twin is None else [twin.rows])):
        taken.clear()

    normed = [[s.normed("input", x) for x in xs] for s, xs in zip(sides, both)]
    yield _stage(layer, [f"self_attn.{part}_proj" for part in "qkv"], normed, shared=shared)
    heads = [[s.attend(n) for n in ns] for s, ns in zip(sides, normed)]
    del normed
    yield _stage(layer, ["self_attn.o_proj"], heads, shared=shared)
    both = [
        [x.add_(s.linear("self_attn.o_proj", h)) for x, h in zip(xs, hs)]
        for s, xs, hs in zip(sides, both, heads)
    ]
    del heads
    added, counts = yield from _mlp_stages(
        sides,
        [[s.normed("post_attention", x).flatten(0, -2) for x in xs] for s, xs in zip(sides, both)],
        least_rows,
        crew,
        shared,
    )
    done = [
        crew.join([x.add_(y.view_as(x)) for x, y in zip(xs, ys)]) for xs, ys in zip(both, added)
    ]
    return Done(done[0], done[1] if twin is not None else None, counts)


def _mlp_stages(
    sides: list[Layer], flat: list[list[Tensor]], least_rows: int, crew: Crew, shared: Shared
) -> Generator[Stage, None, tuple[list[list[Tensor]], Tensor]]:
    """What is added to this rank's batches of rows (T, D), of each side; and tokens of each expert,
    (E,). A twin's rows go by its own router."""
    layer, model = sides[0], sides[0].model
    plain = ("gate_proj", "up_proj", "down_proj")
    if not model.has_experts(layer.index):
        walk = _swiglu(sides, "mlp.", plain, flat, shared=shared)
        del flat  # it goes when its last reader has read
        added = yield from walk
        return added, torch.zeros(0, dtype=torch.int64)
    every = [crew.join(xs) for xs in flat]
    sizes, mine = [len(x) for x in every[0]], crew.batches(shared.batches)
    y_TD, counts = yield from _experts(sides, [torch.cat(xs) for xs in every], least_rows, crew)
    added = [list(y_TD.split(sizes)[mine])]
    for s, xs in zip(sides[1:], flat[1:]):
        added.append([_whole(_experts([s], [x], 0, Crew()))[0] for x in xs])
    if model.shared_size:
        given = yield from _swiglu(sides, "mlp.shared_expert.", plain, flat, shared=shared)
        for s, xs, ys, more in zip(sides, flat, added, given):
            for x, y, z in zip(xs, ys, more):
                y += s.linear("mlp.shared_expert_gate", x).sigmoid() * z
    return added, counts


def _swiglu(
    sides: list[Layer],
    prefix: str,
    names: tuple[str, str, str],
    rows: list[list[Tensor]],
    own: int | None = None,
    shared: Shared | None = None,
) -> Generator[Stage, None, list[list[Tensor]]]:
    """One MLP: two stages, then what it gives for batches of rows of each side."""
    layer = sides[0]
    yield _stage(layer, [prefix + name for name in names[:2]], rows, own, shared)
    rows = [[s.active(prefix, names, x) for x in xs] for s, xs in zip(sides, rows)]
    yield _stage(layer, [prefix + names[2]], rows, own, shared)
    return [[s.linear(prefix + names[2], x) for x in xs] for s, xs in zip(sides, rows)]


def _experts(
    sides: list[Layer], flat: list[Tensor], least_rows: int, crew: Crew
) -> Generator[Stage, None, tuple[Tensor, Tensor]]:
    """The experts one after another, on each rank its own; their weighted sum (T, D) and tokens of
    each. The twin's see the tokens that this side's router chose for them, so that pairs of rows
    belong together."""
    layer, model = sides[0], sides[0].model
    x_TD = flat[0]
    routing = layer.route(x_TD)
    y_TD = torch.zeros_like(x_TD)
    for now, mine in crew.rounds(routing.counts_E):
        given = {}
        for e in mine:
            token, place = (routing.ids_TA == e).nonzero(as_tuple=True)
            own = len(token)
            shown = torch.cat([token, stand_ins(token, len(x_TD), least_rows - own)])
            prefix, rows = f"{model.moe}.experts.{e}.", [[x[shown]] for x in flat]
            outputs = yield from _swiglu(sides, prefix, model.parts, rows, own)
            weight = routing.weights_TA[token, place].to(x_TD.dtype).unsqueeze(1)
            given[str(e)] = outputs[0][0][:own] * weight
        given = crew.exchange(given)
        for e in now:
            token = (routing.ids_TA == e).nonzero(as_tuple=True)[0]
            y_TD.index_add_(0, token, given[str(e)])
    return y_TD, routing.counts_E


def _whole(walk: Generator[Stage, None, Any]) -> Any:
    """What a walk comes to where nothing is changed on the way."""
    try:
        while True:
            next(walk)
    except StopIteration as stop:
        return stop.value


def _stage(
    layer: Layer,
    names: list[str],
    sides: list[list[Tensor]],
    own_rows: int | None = None,
    shared: Shared | None = None,
) -> Stage:
    linears = {name: layer.weights[f"{name}.weight"] for name in names}
    return Stage(linears, sides[0], sides[1] if len(sides) > 1 else None, own_rows, shared)


def _angles(model: Ordinary, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (L, 1, K)."""
    rope, K = model.rope, model.head_dim
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, K, 2).float() / K)
    if rope["rope_type"] == "llama3":
        frequency = _llama3(frequency, rope)
    angle = torch.outer(torch.arange(length).float(), frequency)
    angle = torch.cat([angle, angle], -1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _llama3(frequency: Tensor, rope: Mapping[str, float]) -> Tensor:
    """Low frequencies divided by `factor`, high ones as they are, those between in part.

    Source: Llama 3.1's rotary embedding.
    """
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    part = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (part + (1 - part) / rope["factor"])


def _rotate(x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x_BLHK.chunk(2, -1)
    return x_BLHK * cos + torch.cat([-high, low], -1) * sin
