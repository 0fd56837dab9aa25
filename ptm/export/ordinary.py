"""Ordinary models as a walk: a Hugging Face folder of Llama, Mixtral, Qwen2-MoE or Qwen3-MoE.

Its safetensors files are read with distrust (ptm/checkpoint/); nothing of transformers is needed.
Experts may lie one by one, or all of a layer in one tensor as transformers has them in memory:

    mlp.experts.gate_up_proj  (E, 2 F, D)    gate's rows first
    mlp.experts.down_proj     (E, D, F)

An export always has them one by one, which is what readers of quantized files want: Mixtral's under
the names that GPTQModel has in a gptq folder, else under the published ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptm.checkpoint import hf_config
from ptm.checkpoint.hf import copy_tokenizer, open_weights
from ptm.checkpoint.source import TensorInfo, TensorSource
from ptm.checkpoint.untrusted import read_json
from ptm.common.errors import CheckpointError, line
from ptm.export.calibrate import Text, join_counts
from ptm.export.config import ExportFormat
from ptm.export.crew import Crew
from ptm.export.ordinary_config import Kind, parse
from ptm.export.ordinary_layer import Layer, Twin, stages
from ptm.export.stages import Done, Stage
from ptm.quant.config import Layers

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GENERATION = "generation_config.json"
_OLD = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class OrdinaryWalk:
    """Quantized are q, k, v, o and every MLP, shared experts too; routers and head never."""

    isolate_documents = False

    def __init__(self, folder: Path, format: ExportFormat) -> None:
        self.folder = self.tokenizer = folder
        self.keys = read_json(folder, hf_config.FILE)
        model = parse(self.keys)
        is_old = model.kind is Kind.mixtral and format is not ExportFormat.gptq
        self.model = model = dataclasses.replace(model, has_old_names=is_old)
        self.format = format
        self.num_layers, self.vocab_size = model.num_layers, model.vocab_size
        self.max_positions = model.max_positions
        self.num_experts, self.experts_per_token = model.num_experts, model.experts_per_token
        self._shapes = model.shapes()
        self._source = Named(open_weights(folder), self._shapes, model.num_experts, folder)
        stored = self._source.info(EMBEDDING).dtype
        self.dtype = stored if stored is torch.float16 else torch.bfloat16
        is_ct = format is ExportFormat.compressed_tensors  # whose readers want the model's dtype
        self.scale_dtype = self.dtype if is_ct else torch.float16

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def linears(self, layers: Layers) -> dict[str, tuple[int, int]]:
        return {
            f"model.layers.{i}.{name}": shape
            for i in range(self.num_layers)
            for name, shape in self.model.linears(i).items()
        }

    def left(self, layers: Layers) -> list[str]:
        gates = ("gate.weight", "shared_expert_gate.weight")
        found = [n.removesuffix(".weight") for n in self._shapes if n.endswith(gates)]
        return [*found, HEAD.removesuffix(".weight")]

    def read(self, name: str) -> Tensor:
        return self._source.read(name)

    def text(self, ids_RL: Tensor, documents_RL: Tensor, micro_batch_size: int) -> Text:
        return Text(list(ids_RL.split(micro_batch_size)), [])

    def embed(self, text: Text) -> list[Tensor]:
        table = self.read(EMBEDDING).to(torch.bfloat16)
        return [torch.nn.functional.embedding(ids, table) for ids in text.ids]

    @torch.no_grad()
    def routed_rows(self, text: Text, advance: Callable[[], None], crew: Crew) -> Tensor:
        rows, found = self.embed(text)[crew.batches(len(text.ids))], []
        for index in range(self.num_layers):
            layer, counts = self._layer(index), []
            for i, x in enumerate(rows):
                x = x + layer.linear("self_attn.o_proj", layer.attend(layer.normed("input", x)))
                m = layer.normed("post_attention", x)
                if self.model.has_experts(index):
                    by_row = layer.route(m.flatten(0, -2)).ids_TA.view(len(x), -1)
                    counts.append(torch.nn.functional.one_hot(by_row, self.num_experts).sum(1))
                rows[i] = x + layer.mlp(m)
            if counts:
                found.append(torch.cat(counts))
            advance()
        return join_counts(found, crew)

    def stages(
        self,
        layer: int,
        rows: list[Tensor],
        text: Text,
        crew: Crew,
        *,
        twin_rows: list[Tensor] | None,
        least_rows: int,
    ) -> Generator[Stage, None, Done]:
        twin = None if twin_rows is None else Twin(self._layer(layer), twin_rows)
        return stages(self._layer(layer), rows, crew=crew, twin=twin, least_rows=least_rows)

    def config(self, folder: Path) -> dict[str, Any]:
        copy_tokenizer(self.tokenizer, folder)
        name = "torch_dtype" if "torch_dtype" in self.keys else "dtype"
        return {**self.keys, name: str(self.dtype).removeprefix("torch.")}

    def quantization(self, keys: dict[str, Any]) -> dict[str, Any]:
        if self.format is not ExportFormat.gptq:
            return keys
        # transformers goes by these and not by `dynamic`; it compares ends of names.
        groups = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"]]
        return {**keys, "modules_in_block_to_quantize": [*groups, ["down_proj"]]}

    def generation_config(self) -> dict[str, Any]:
        if (self.folder / GENERATION).exists():
            return read_json(self.folder, GENERATION)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {name: self.keys[name] for name in names if self.keys.get(name) is not None}

    def _layer(self, index: int) -> Layer:
        return Layer(self.model, self._source, index, torch.bfloat16)


class _Place(NamedTuple):
    """Where a tensor is: all of a stored one, or of expert `e` the rows start..stop."""

    name: str
    e: int = -1
    start: int = 0
    stop: int = 0


class Named:
    """A folder's tensors under the names of `shapes`, wherever they lie.

    Raises CheckpointError unless every one is there, in its shape, and no other one.
    """

    def __init__(
        self,
        source: TensorSource,
        shapes: dict[str, tuple[int, ...]],
        num_experts: int,
        folder: Path,
    ) -> None:
        self._source, there = source, set(source.names())
        self._places: dict[str, _Place] = {}
        for name, shape in shapes.items():
            place = next((p for p in _places(name, shape) if p.name in there), None)
            if place is None:
                rule = f"is missing in {folder}"
                raise CheckpointError(line("tensor", name, rule, "get the whole folder again"))
            self._places[name] = place
            found, wanted = source.info(place.name).shape, shape
            if place.e >= 0:
                parts = 2 if place.name.endswith("gate_up_proj") else 1
                wanted = (num_experts, parts * shape[0], shape[1])
            if found != wanted:
                rule = f"has shape {found} in {folder} and needs {wanted}"
                raise CheckpointError(line("tensor", place.name, rule, "get it again"))
        used = {place.name for place in self._places.values()} | {HEAD}
        others = sorted(n for n in there - used if not n.endswith("rotary_emb.inv_freq"))
        if others:
            rule = f"is unknown in {folder}"
            raise CheckpointError(line("tensor", others[0], rule, "quantize a model ptm knows"))

    def names(self) -> list[str]:
        return list(self._places)

    def info(self, name: str) -> TensorInfo:
        place = self._places[name]
        stored = self._source.info(place.name)
        if place.e < 0:
            return stored
        return TensorInfo((place.stop - place.start, stored.shape[2]), stored.dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        place = self._places[name]
        if place.e < 0:
            return self._source.read(place.name, start, stop)
        whole = self._source.read(place.name, place.e, place.e + 1)[0]
        return whole[place.start : place.stop][start:stop].clone()


def _places(name: str, shape: tuple[int, ...]) -> list[_Place]:
    """Where a tensor may be, likeliest first."""
    new = name.replace("block_sparse_moe.", "mlp.")
    for part, old in _OLD.items():
        new = new.replace(f".{old}.weight", f".{part}.weight")
    found = [_Place(name), _Place(new)]
    head, is_expert, tail = new.partition(".mlp.experts.")
    if new.endswith("mlp.gate.weight"):
        found.append(_Place(new.replace("mlp.", "block_sparse_moe.")))
    if is_expert:
        e, part, _ = tail.split(".")
        found.append(_Place(f"{head}.block_sparse_moe.experts.{e}.{_OLD[part]}.weight"))
        rows = shape[0]
        start = rows if part == "up_proj" else 0
        fused = "down_proj" if part == "down_proj" else "gate_up_proj"
        found.append(_Place(f"{head}.mlp.experts.{fused}", int(e), start, start + rows))
    return found
