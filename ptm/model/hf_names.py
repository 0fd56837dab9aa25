"""Names and layouts of the published Yuan2.0-M32 weights against ours, both ways, no I/O.

Two layouts were published, and both hold our rows in order, only cut at other places:

    ours                              hf                           hf2
    self_attn.q_proj.weight (P, D)    the same                     self_attn.get_query_key.weight
    self_attn.k_proj.weight (P, D)    the same                       (2P, D), q_proj's rows first
    mlp.gate.query.weight (E, D)      the same                     mlp.router.query_key_value.weight
    mlp.gate.key, mlp.gate.value      the same                       (3E, D), query's rows first
    mlp.experts.w1 (E, 2F, D)         mlp.experts.<e>.w1.weight    mlp.experts.w1.<e>.weight
    mlp.experts.w2 (E, D, F)          mlp.experts.<e>.w2.weight    mlp.experts.w2.<e>.weight

So a tensor is `Rows` of others, and converting copies bytes: nothing is transposed or computed.
What q_proj and k_proj *hold* is odd (per head [q_h; k_h], so that each has both for half of the
heads): ptm/model/attention.py knows that, and because we keep the published halves, nobody here has
to. A tied model's lm_head.weight is published as a copy of the embedding.

Only the attention router was published; a model with another one has no names here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ptm.common.config import Choice
from ptm.common.errors import CheckpointError, line
from ptm.model.config import ModelConfig, RouterKind

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Layout(Choice):
    """How a published folder cuts its tensors."""

    hf = "hf"
    hf2 = "hf2"


class Piece(NamedTuple):
    """Rows start..stop of dim 0 of a tensor."""

    name: str
    start: int
    stop: int


class Rows(NamedTuple):
    """A tensor as the concatenation of others' rows, and its shape."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of our model. Raises CheckpointError for a router that was never published."""
    if config.router is not RouterKind.attention:
        raise CheckpointError(
            line("model.router", config.router, "has no published form", "use router=attention")
        )
    D, P, F = config.hidden_size, config.attention_projection_size, config.moe_intermediate_size
    E, V = config.num_experts, config.vocab_size
    layer = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (P, D),
        "self_attn.k_proj.weight": (P, D),
        "self_attn.v_proj.weight": (P, D),
        "self_attn.o_proj.weight": (D, P),
        "self_attn.lf_gate.conv1.weight": (D // 2, D, 2, 1),
        "self_attn.lf_gate.conv1.bias": (D // 2,),
        "self_attn.lf_gate.conv2.weight": (D, D // 2, 2, 1),
        "self_attn.lf_gate.conv2.bias": (D,),
        "self_attn.lf_gate.output_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate.query.weight": (E, D),
        "mlp.gate.key.weight": (E, D),
        "mlp.gate.value.weight": (E, D),
        "mlp.experts.w1": (E, 2 * F, D),
        "mlp.experts.w2": (E, D, F),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, D)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (V, D)
    return shapes


def num_published(config: ModelConfig) -> int:
    """Upper bound on a published folder's tensors, from the numbers alone; 1875 for M32."""
    return config.num_hidden_layers * (14 + 2 * config.num_experts) + 3


def published(config: ModelConfig, layout: Layout, *, tied_copy: bool) -> dict[str, Rows]:
    """Every published tensor as rows of ours; `tied_copy` adds lm_head.weight to a tied model."""
    shapes = our_shapes(config)
    found = {}
    for name, shape in shapes.items():
        if name.endswith(("mlp.experts.w1", "mlp.experts.w2")):
            stem, matrix = name.rsplit(".", 1)
            for e in range(config.num_experts):
                where = f"{e}.{matrix}" if layout is Layout.hf else f"{matrix}.{e}"
                found[f"{stem}.{where}.weight"] = Rows(shape[1:], (Piece(name, e, e + 1),))
        else:
            where, order, count = _joined(name) if layout is Layout.hf2 else (name, 0, 1)
            before = found[where].pieces if order else ()
            full = (count * shape[0], *shape[1:])
            found[where] = Rows(full, (*before, Piece(name, 0, shape[0])))
    if tied_copy and config.tie_word_embeddings:
        found[HEAD] = Rows(shapes[EMBEDDING], (Piece(EMBEDDING, 0, config.vocab_size),))
    return found


def imported(config: ModelConfig, layout: Layout) -> dict[str, Rows]:
    """Every tensor of ours as rows of published ones: `published` read backwards."""
    shapes = our_shapes(config)
    parts: dict[str, list[tuple[int, Piece]]] = {name: [] for name in shapes}
    for name, rows in published(config, layout, tied_copy=False).items():
        row, row_numel = 0, math.prod(rows.shape[1:])
        for piece in rows.pieces:
            numel = (piece.stop - piece.start) * math.prod(shapes[piece.name][1:])
            stop = row + numel // row_numel
            parts[piece.name].append((piece.start, Piece(name, row, stop)))
            row = stop
    return {name: Rows(shapes[name], tuple(p for _, p in sorted(parts[name]))) for name in shapes}


def layout_of(names: list[str]) -> Layout:
    """Which layout a folder with these tensors has; hf unless a name of hf2 is there."""
    return Layout.hf2 if any(".get_query_key." in name for name in names) else Layout.hf


def _joined(name: str) -> tuple[str, int, int]:
    # hf2's tensor that holds `name`, as which of how many.
    for parts, joined in (
        (("self_attn.q_proj", "self_attn.k_proj"), "self_attn.get_query_key"),
        (("mlp.gate.query", "mlp.gate.key", "mlp.gate.value"), "mlp.router.query_key_value"),
    ):
        for order, part in enumerate(parts):
            if name.endswith(f".{part}.weight"):
                return name.replace(part, joined), order, len(parts)
    return name, 0, 1
