"""How far quantized folders are from the model that they were made of: outputs and predictions.

Error of a linear: ||(W - V) X||^2 / ||W X||^2, with X what it reads in the model as it was, in
fp32. KL: mean over all held-out tokens, of the predictions of both models in fp32. Every folder is
read by ptm's own readers, whoever wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.bench.gptq_workload import read_tokens
from ptm.checkpoint import quant_config
from ptm.checkpoint.dequant import QuantSource
from ptm.checkpoint.hf import open_weights
from ptm.checkpoint.source import TensorSource
from ptm.export.ordinary_config import Ordinary, parse
from ptm.export.ordinary_layer import Layer, stages
from ptm.quant.gptq import Hessian, relative_error

BATCH = 8


class Measured(NamedTuple):
    """output_error: mean over linears; kl: over tokens."""

    output_error: float
    kl: float


class Reference:
    """The model as it was: products of its inputs and its predictions, kept for all folders."""

    def __init__(self, workload: Path) -> None:
        self.model = parse(json.loads((workload / "config.json").read_text()))
        self.weights = open_weights(workload)
        _, self.held_out = read_tokens(workload)
        self.inputs = _hessians(self.model, self.weights, self.held_out)
        self.log_p = list(_log_p(self.model, self.weights, self.held_out))

    def measure(self, folder: Path) -> Measured:
        """Of an export, gptq or compressed-tensors. Raises CheckpointError where it is none."""
        keys = json.loads((folder / "config.json").read_text())[quant_config.KEY]
        source = QuantSource(open_weights(folder), quant_config.parse(keys))
        error = 0.0
        for name, mean_KK in self.inputs.items():
            weight, near = (s.read(f"{name}.weight").float() for s in (self.weights, source))
            error += relative_error(weight, near, mean_KK)
        total, tokens = 0.0, 0
        for mine, theirs in zip(_log_p(self.model, source, self.held_out), self.log_p):
            total += float((theirs.exp() * (theirs - mine)).sum(dtype=torch.float64))
            tokens += mine[..., 0].numel()
        return Measured(error / len(self.inputs), total / tokens)


@torch.no_grad()
def _hessians(model: Ordinary, weights: TensorSource, ids: Tensor) -> dict[str, Tensor]:
    """Mean products of what each linear reads. Those with one input share one tensor."""
    rows, found = _embed(weights, ids), {}
    for i in range(model.num_layers):
        walk = stages(Layer(model, weights, i, torch.float32), rows)
        try:
            while True:
                stage = next(walk)
                hessian = Hessian(next(iter(stage.linears.values())).shape[1])
                for x in stage.inputs:
                    hessian.add(x)
                mean = hessian.mean()
                found |= {f"model.layers.{i}.{name}": mean for name in stage.linears}
        except StopIteration as stop:
            rows = stop.value.rows
    return found


@torch.no_grad()
def _log_p(model: Ordinary, weights: TensorSource, ids: Tensor) -> Iterator[Tensor]:
    """Log probabilities of every next token, batch by batch."""
    layers = [Layer(model, weights, i, torch.float32) for i in range(model.num_layers)]
    norm, head = (weights.read(n).float() for n in ("model.norm.weight", "lm_head.weight"))
    for x in _embed(weights, ids):
        for layer in layers:
            x = x + layer.linear("self_attn.o_proj", layer.attend(layer.normed("input", x)))
            x = x + layer.mlp(layer.normed("post_attention", x))
        x = F.rms_norm(x, (x.shape[-1],), norm, model.norm_eps)
        yield F.linear(x, head).log_softmax(-1)


def _embed(weights: TensorSource, ids: Tensor) -> list[Tensor]:
    table = weights.read("model.embed_tokens.weight").float()
    return [F.embedding(batch, table) for batch in ids.split(BATCH)]
