"""`ptm export verify`: an export beside what it was made from, on held-out text.

Compared are predictions (loss, KL divergence from the run's, how often the likeliest token is the
same), outputs of each linear (relative error on inputs of the run's own layers), and size; and the
same for rounding to nearest, made here, on the same grids. All models have the run's rotary mode
and treatment of documents, which a published config.json cannot say.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptm.checkpoint.dequant import QuantSource
from ptm.checkpoint.hf import Opened
from ptm.checkpoint.load_model import module_of
from ptm.checkpoint.source import RowsSource
from ptm.common.errors import CheckpointError, line
from ptm.export.calibrate import embed, load_block, make_text
from ptm.export.stages import stages
from ptm.kernels.loss import IGNORED
from ptm.model.hf_names import Layout, published
from ptm.model.transformer import Transformer
from ptm.quant.gptq import Hessian, relative_error
from ptm.quant.grid import round_to_nearest


def models_of(reference: Opened, others: Mapping[str, Opened]) -> dict[str, Transformer]:
    """The run's model in bf16, that of each export, and `nearest`: the run's on the first export's
    grids without data. Raises CheckpointError where an export is of another model."""
    found = {"bf16": module_of(reference, "run", dtype=torch.bfloat16)}
    for name, opened in others.items():
        same = {k: getattr(reference.model, k) for k in ("rope_mode", "isolate_documents", "scale")}
        same |= {"router_bias_update_rate": 0.0}
        as_run = dataclasses.replace(opened.model, **same)
        if as_run != dataclasses.replace(reference.model, router_bias_update_rate=0.0):
            rule = "is not an export of the run: their models differ"
            raise CheckpointError(line("export", opened.folder, rule, "name its own run"))
        weights = opened._replace(model=as_run)
        found[name] = module_of(weights, opened.folder, dtype=torch.bfloat16)
    first = next(iter(others.values()))
    nearest = copy.deepcopy(found["bf16"])
    source = _quantized(first)
    plain = RowsSource(reference.weights, published(reference.model, Layout.hf, tied_copy=False))
    for module in source.modules:
        weight = plain.read(f"{module}.weight").float()
        grid = source.quantized(module)[0].grid
        parameter_of(nearest, module).copy_(round_to_nearest(weight, grid).dequantize())
    return {**found, "nearest": nearest}


def _quantized(opened: Opened) -> QuantSource:
    if opened.quantized is None:
        raise CheckpointError(line("export", opened.folder, "is not quantized", "name an export"))
    return opened.quantized


def parameter_of(model: Transformer, module: str) -> Tensor:
    """The weight of a published linear, in our model."""
    head, _, tail = module.partition(".experts.")
    if not tail:
        return model.get_parameter(f"{module}.weight").data
    expert, matrix = tail.split(".")
    return model.get_parameter(f"{head}.experts.{matrix}").data[int(expert)]


@torch.no_grad()
def compare(
    models: Mapping[str, Transformer], batches: Iterable[Any]
) -> dict[str, dict[str, float]]:
    """Of each model its loss, and against the first kl and top1."""
    names = list(models)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    tokens = 0
    for batch in batches:
        labels = batch.labels.masked_fill(~batch.loss_mask, IGNORED).flatten()
        kept = labels != IGNORED
        base: Tensor | None = None
        for name in names:
            logits = models[name](
                batch.input_ids,
                position_ids_BL=batch.position_ids,
                document_ids_BL=batch.document_ids,
            )
            log_p = torch.log_softmax(logits.flatten(0, 1)[kept].float(), -1)
            base = log_p if base is None else base
            nll = -log_p.gather(1, labels[kept].unsqueeze(1)).sum()
            kl = (base.exp() * (base - log_p)).sum()
            top1 = (base.argmax(-1) == log_p.argmax(-1)).sum()
            sums[name] += torch.tensor([float(nll), float(kl), float(top1)])
        tokens += int(kept.sum())
    return {
        name: {
            "loss": float(s[0]) / tokens,
            "kl": max(0.0, float(s[1]) / tokens),
            "top1": float(s[2]) / tokens,
        }
        for name, s in sums.items()
    }


def layer_errors(
    reference: Opened, exports: Mapping[str, Opened], ids: Tensor, documents: Tensor, rows: int
) -> list[dict[str, Any]]:
    """Of each quantized linear: name, and per export the relative error of its outputs where the
    run's own layers feed it. Linears that no token reached are left out."""
    model, dtype = reference.model, torch.bfloat16
    sources = {name: _quantized(opened) for name, opened in exports.items()}
    plain = RowsSource(reference.weights, published(model, Layout.hf, tied_copy=False))
    text = make_text(model, ids, documents, rows)
    hidden, found = embed(reference.weights, text, dtype), []
    for layer in range(model.num_hidden_layers):
        block = load_block(model, reference.weights, layer, dtype)
        walk = stages(block, hidden, text.contexts)
        try:
            while True:
                stage = next(walk)
                hessian = Hessian(next(iter(stage.linears.values())).shape[1])
                for x in stage.inputs:
                    hessian.add(x)
                mean = hessian.mean()
                for inner in stage.linears if hessian.num_rows else ():
                    name = f"model.layers.{layer}.{inner}"
                    row: dict[str, Any] = {"name": name, "rows": hessian.num_rows}
                    weight = plain.read(f"{name}.weight").float()
                    for export, source in sources.items():
                        if name in source.modules:
                            near = source.read(f"{name}.weight")
                            row[export] = relative_error(weight, near, mean)
                    if len(row) > 2:
                        found.append(row)
        except StopIteration as stop:
            hidden = stop.value.rows
    return found


def size_of(opened: Opened) -> int:
    """Bytes of the weights on disk, of a folder of safetensors; of others in bf16."""
    if opened.quantized is not None:
        return sum(path.stat().st_size for path in Path(opened.folder).glob("*.safetensors"))
    return sum(2 * math.prod(opened.weights.info(name).shape) for name in opened.weights.names())
