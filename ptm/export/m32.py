"""M32 as a walk: runs, checkpoints and published folders, under the published names."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptm.checkpoint import hf_config
from ptm.checkpoint.hf import Opened, copy_tokenizer
from ptm.checkpoint.source import RowsSource
from ptm.export.calibrate import Text, embed, load_block, make_text, routed_rows
from ptm.export.convert import finish_tokenizer
from ptm.export.crew import Crew
from ptm.export.stages import Done, Stage, Twin, stages
from ptm.model.config import ModelConfig
from ptm.model.hf_names import Layout, published
from ptm.quant.config import Layers


def linears_of(model: ModelConfig, layers: Layers) -> dict[str, tuple[int, int]]:
    """Every linear to quantize, by its published name, and its shape (N, K)."""
    found = {}
    for name, rows in published(model, Layout.hf, tied_copy=False).items():
        head, _, inner = name.removesuffix(".weight").partition("model.layers.")
        inner = inner.partition(".")[2]
        is_linear = "_proj" in inner or ".experts." in inner or inner.startswith("mlp.gate.")
        is_chosen = not inner.startswith("mlp.gate") or layers is Layers.published
        if not head and is_linear and is_chosen:
            found[name.removesuffix(".weight")] = (rows.shape[0], rows.shape[1])
    return found


class M32:
    """Quantized are q, k, v, o and all experts, and with layers=published the router."""

    def __init__(self, opened: Opened) -> None:
        self.opened, model = opened, opened.model
        self.folder, self.tokenizer = opened.folder, opened.tokenizer
        self.num_layers, self.vocab_size = model.num_hidden_layers, model.vocab_size
        self.max_positions = model.max_position_embeddings
        self.isolate_documents = model.isolate_documents
        self.num_experts = model.num_experts
        self.experts_per_token = model.num_experts_per_tok
        self.dtype, self.scale_dtype = torch.bfloat16, torch.float16
        self._layout = published(model, Layout.hf, tied_copy=False)
        self._source = RowsSource(opened.weights, self._layout)

    def names(self) -> list[str]:
        return list(self._layout)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._layout[name].shape

    def linears(self, layers: Layers) -> dict[str, tuple[int, int]]:
        return linears_of(self.opened.model, layers)

    def left(self, layers: Layers) -> list[str]:
        chosen = self.linears(layers)
        return [name for name in self.linears(Layers.published) if name not in chosen]

    def read(self, name: str) -> Tensor:
        return self._source.read(name)

    def text(self, ids_RL: Tensor, documents_RL: Tensor, micro_batch_size: int) -> Text:
        return make_text(self.opened.model, ids_RL, documents_RL, micro_batch_size)

    def embed(self, text: Text) -> list[Tensor]:
        return embed(self.opened.weights, text, self.dtype)

    def routed_rows(self, text: Text, advance: Callable[[], None], crew: Crew) -> Tensor:
        return routed_rows(self.opened.model, self.opened.weights, text, self.dtype, advance, crew)

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
        model, weights = self.opened.model, self.opened.weights
        block = load_block(model, weights, layer, self.dtype)
        twin = None
        if twin_rows is not None:
            twin = Twin(load_block(model, weights, layer, self.dtype), twin_rows)
        return stages(block, rows, text.contexts, crew=crew, twin=twin, least_rows=least_rows)

    def config(self, folder: Path) -> dict[str, Any]:
        ids = finish_tokenizer(self.opened, folder)
        copy_tokenizer(self.tokenizer, folder)
        origin = self.opened.origin
        keys = hf_config.render(self.opened.model, origin.config if origin else None, **ids)
        return hf_config.with_dtype(keys, self.dtype)

    def quantization(self, keys: dict[str, Any]) -> dict[str, Any]:
        return keys

    def generation_config(self) -> dict[str, Any]:
        return {"do_sample": False}
