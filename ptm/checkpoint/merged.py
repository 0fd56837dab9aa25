"""Checkpoints of adapters, opened as the model that they make of their base.

Such a checkpoint holds A and B, soft tokens or a prefix, and in its meta the `adapter` section and
the `base` (a folder and its digest). Reading a weight adds the change to the base's, in fp32, and
rounds to the base's type once; nothing of the model's size is in memory. So whatever opens a model
opens a tuned one: generate, eval, convert, export, and train.init_from of the next run. Soft tokens
and prefixes are tensors more, which generate and eval know of; the others refuse them
(`open_model`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ptm.checkpoint import manifest
from ptm.checkpoint.hf import Opened
from ptm.checkpoint.manifest import Manifest
from ptm.checkpoint.source import TensorInfo, TensorSource, check_shapes
from ptm.checkpoint.weights import MODEL_KEY, TOKENIZER, model_from_json, stored_weights
from ptm.common.errors import CheckpointError, PtmError, line
from ptm.model.adapter import add_adapter
from ptm.model.lora import PREFIX, changed, names_of, places
from ptm.model.lora_config import ALL_WEIGHTS, AdapterConfig, AdapterKind
from ptm.model.transformer import Transformer

ADAPTER_KEY, BASE_KEY = "adapter", "base"


def adapter_to_json(config: AdapterConfig) -> dict[str, Any]:
    """The adapter section as plain JSON values."""
    words = {"kind": str(config.kind), "base": str(config.base), "targets": list(config.targets)}
    return {**dataclasses.asdict(config), **words}


def adapter_from_json(values: Any) -> AdapterConfig:
    """The adapter section of a manifest. Raises CheckpointError."""
    try:
        kind, targets = AdapterKind(values["kind"]), tuple(str(role) for role in values["targets"])
        rank, alpha = int(values["rank"]), float(values["alpha"])
        soft = int(values.get("prompt_tokens", AdapterConfig().prompt_tokens))
        return AdapterConfig(kind=kind, targets=targets, rank=rank, alpha=alpha, prompt_tokens=soft)
    except (KeyError, TypeError, ValueError, PtmError) as error:
        rule, remedy = f"is no adapter that this ptm knows ({error})", "use the ptm that wrote it"
        raise CheckpointError(f"{manifest.FILE}: " + line(ADAPTER_KEY, "", rule, remedy)) from None


def open_adapter(folder: Path, found: Manifest, base: Opened) -> Opened:
    """The model that a verified checkpoint of changes makes of `base`. Raises CheckpointError."""
    model = model_from_json(found.meta.get(MODEL_KEY))
    config = adapter_from_json(found.meta[ADAPTER_KEY])
    made = Transformer(model, device="meta")
    plain = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    check_shapes(base.weights, plain, base.folder)
    weights = {name for name, _ in made.named_parameters()}
    add_adapter(made, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    own = {name: shape for name, shape in shapes.items() if name not in weights}
    changes = stored_weights(folder, found, own)
    check_shapes(changes, own, folder)
    merged = MergedSource(base, changes, made, config)
    return base._replace(
        model=model,
        weights=merged,
        tokenizer=folder / TOKENIZER,
        folder=folder,
        quantized=None,
        beside=config if config.kind is not AdapterKind.lora else ALL_WEIGHTS,
    )


class MergedSource:
    """A base's tensors with low-rank changes; buffers and whatever stands beside weights are the
    checkpoint's own."""

    def __init__(
        self, base: Opened, changes: TensorSource, made: Transformer, config: AdapterConfig
    ) -> None:
        """made: on meta, with the changes' parameters (`add_adapter`)."""
        self.base_folder, self.config = base.folder, config
        self._base, self._changes = base.weights, changes
        self._own = {name for name in changes.names() if PREFIX not in name}
        self._scale = config.alpha / config.rank
        self._head_dim = made.config.head_dim
        modules = {module: name for name, module in made.named_modules()}
        self._roles: dict[str, list[tuple[str, str, str]]] = {}
        targets = config.targets if config.kind is AdapterKind.lora else ()
        for role, module, attribute in places(made, targets):
            a, b = (f"{modules[module]}.{name}" for name in names_of(role, attribute))
            self._roles.setdefault(f"{modules[module]}.{attribute}", []).append((role, a, b))

    def names(self) -> list[str]:
        return [*self._base.names(), *sorted(self._own - set(self._base.names()))]

    def info(self, name: str) -> TensorInfo:
        return (self._changes if name in self._own else self._base).info(name)

    def changes_of(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(role, A, B) of each change of a tensor; of stacked ones those of start..stop."""
        for role, *names in self._roles.get(name, ()):
            a, b = (self._changes.read(change, start, stop) for change in names)
            yield role, a, b

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name in self._own:
            return self._changes.read(name, start, stop)
        is_stack = len(self._base.info(name).shape) == 3  # experts: a row is one expert's matrix
        if is_stack or name not in self._roles:
            weight, rows = self._base.read(name, start, stop), (start, stop)
        else:
            weight, rows = self._base.read(name), (0, None)
        merged = weight.float()
        for role, a, b in self.changes_of(name, *rows):
            a, b = a.float(), b.float()
            merged = changed(merged, a, b, role=role, scale=self._scale, head_dim=self._head_dim)
        merged = merged.to(weight.dtype)
        return merged if is_stack or name not in self._roles else merged[start:stop].clone()
