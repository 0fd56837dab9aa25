"""Checkpoints of adapters beside their base, and M32 in its published form for PEFT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptm.checkpoint.config import CheckpointConfig
from ptm.checkpoint.merged import adapter_to_json
from ptm.checkpoint.open_model import base_of
from ptm.checkpoint.save import Saver
from ptm.checkpoint.weights import model_to_json
from ptm.engine.state import stored_shape
from ptm.model.adapter import add_adapter, use_adapter
from ptm.model.lora_config import AdapterConfig
from ptm.model.transformer import Transformer
from tests.support.tiny import tiny_model


class Tuned(NamedTuple):
    """A base's run, a run of its adapter, and the model in use there."""

    base: Path
    tuned: Path
    model: Transformer


def save(run: Path, model: Transformer, step: int, **meta: Any) -> None:
    """A checkpoint as a run leaves it; with meta, of what is trained only."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    state = {
        f"model.{name}": tensor.detach().view(stored_shape(tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
        if not meta or name in trained
    }
    saver = Saver(run / "checkpoints", CheckpointConfig(background=False), run_id=run.name)
    meta = {"model": model_to_json(model.config), **meta}
    saver.save(state | {"optim.exp_avg.x": torch.ones(3)}, step=step, meta=meta, block=True)
    saver.close()


def tune(folder: Path, config: AdapterConfig) -> Tuned:
    """Random values in the adapter of a small model."""
    base, tuned = folder / "base", folder / "tuned"
    model = tiny_model()
    save(base, model, 1)
    add_adapter(model, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    save(tuned, model, 1, adapter=adapter_to_json(config), base=base_of(base)._asdict())
    use_adapter(model, config)
    return Tuned(base, tuned, model)


class Given(nn.Embedding):
    """An embedding that can be told its result."""

    given: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.given is None else self.given


class Expert(nn.Module):
    def __init__(self, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w1 = nn.Linear(w1.shape[1], w1.shape[0], bias=False)
        self.w2 = nn.Linear(w2.shape[1], w2.shape[0], bias=False)
        self.w1.weight.data, self.w2.weight.data = w1.clone(), w2.clone()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class OneByOne:
    """A dispatcher over a list of experts."""

    def run(self, x_TD: Tensor, routing: Any, experts: Any) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(experts):
            rows, slots = (routing.ids_TA == e).nonzero(as_tuple=True)
            weights = routing.weights_TA[rows, slots, None]
            y_TD = y_TD.index_add(0, rows, expert(x_TD[rows]) * weights)
        return y_TD


class AsPublished(nn.Module):
    """M32 as PEFT asks for it: published names, a module for each expert, a config of
    transformers, by ids or by embeddings."""

    def __init__(self, base: Transformer, transformers: Any) -> None:
        super().__init__()
        sizes = base.config
        embedding = Given(sizes.vocab_size, sizes.hidden_size)
        embedding.weight.data = base.model.embed_tokens.weight.data
        base.model.embed_tokens = embedding  # type: ignore[assignment]
        for block in base.model.layers:
            pairs = zip(block.mlp.experts.w1.data, block.mlp.experts.w2.data)  # type: ignore
            block.mlp.experts = nn.ModuleList(Expert(*pair) for pair in pairs)  # type: ignore
            block.mlp.dispatcher = OneByOne()  # type: ignore[assignment]
        self.model, self._run = base.model, [base]
        self.device = torch.device("cpu")
        self.config = transformers.PretrainedConfig(
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
            vocab_size=sizes.vocab_size,
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nobody generates here")

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any
    ) -> SimpleNamespace:
        embedding: Any = self.model.embed_tokens
        embedding.given = inputs_embeds
        if input_ids is None:
            assert inputs_embeds is not None
            input_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64)
        logits = self._run[0](input_ids)
        embedding.given = None
        return SimpleNamespace(logits=logits)
