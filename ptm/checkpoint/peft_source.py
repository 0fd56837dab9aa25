"""PEFT's adapter files, opened as the model that they make of the base they name.

Read are LoRA of linears (what ptm/checkpoint/peft.py writes, and what PEFT writes with its plain
options) and prompt tuning. Everything is a stranger's: keys that change the arithmetic are refused
by name, tensors must fit the base one by one, and patterns are compared as text, never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ptm.checkpoint import hf_config
from ptm.checkpoint.hf import Opened
from ptm.checkpoint.merged import MergedSource
from ptm.checkpoint.peft import BASE, CONFIG, PREFIX, PROMPT, WEIGHTS, any_number
from ptm.checkpoint.source import (
    FolderSource,
    RowsSource,
    TensorInfo,
    TensorSource,
    all_rows,
    check_shapes,
)
from ptm.checkpoint.untrusted import read_json
from ptm.common.errors import CheckpointError, line
from ptm.model.adapter import SOFT_TOKENS, add_adapter
from ptm.model.hf_names import Layout, Rows, imported, published
from ptm.model.lora_config import ALL_WEIGHTS, AdapterConfig, AdapterKind
from ptm.model.transformer import Transformer

READ = frozenset(
    (BASE, "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "num_virtual_tokens")
)
NO_MATTER = frozenset(
    (
        "task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
        "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "megatron_core", "qalora_group_size", "token_dim",
        "num_transformer_submodules", "num_attention_heads", "num_layers",
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
        "tokenizer_kwargs",
    )
)  # fmt: skip
"What is known by the tensors themselves, or is for training only."
PLAIN = (("bias", "none"), ("init_lora_weights", True), ("init_lora_weights", "gaussian"))
"Other beginnings change the base, and the files do not say how."
PATTERN = r"(\w|\.|\\d\+)+"


class Change(NamedTuple):
    """scale x b a is added to a published matrix."""

    a: str
    b: str
    scale: float


def base_folder(folder: Path) -> Path:
    """Of a folder with PEFT's files. Raises CheckpointError where it is not on this machine."""
    found = read_json(folder, CONFIG).get(BASE)
    if not isinstance(found, str) or not Path(found).is_dir():
        raise _refuse(BASE, found, "is no folder here", "write that of its base there")
    if (Path(found) / CONFIG).exists() and not (Path(found) / hf_config.FILE).exists():
        raise _refuse(BASE, found, "is an adapter itself", "merge that one first")
    return Path(found)


def open_peft(folder: Path, open_base: Callable[[Path], Opened]) -> Opened:
    """The model of a folder with PEFT's files. Raises CheckpointError."""
    keys = read_json(folder, CONFIG)
    base = open_base(base_folder(folder))
    source = FolderSource(folder, [WEIGHTS])
    kind, beside = keys.get("peft_type"), ALL_WEIGHTS
    for key, value in keys.items():
        if value and key not in READ | NO_MATTER and (key, value) not in PLAIN:
            raise _refuse(key, value, "is not read here", "merge it with PEFT")
    if kind == "PROMPT_TUNING":
        count: Any = keys.get("num_virtual_tokens")
        check_shapes(source, {PROMPT: (count, base.model.hidden_size)}, folder)
        num_soft = source.info(PROMPT).shape[0]
        beside = AdapterConfig(kind=AdapterKind.prompt, prompt_tokens=num_soft)
        made = Transformer(base.model, device="meta")
        add_adapter(made, beside)
        soft = RowsSource(source, {SOFT_TOKENS: all_rows(source, PROMPT)})
        weights: TensorSource = MergedSource(base, soft, made, beside)
    elif kind == "LORA":
        weights = _lora(source, keys, base, folder)
    else:
        raise _refuse("peft_type", kind, "must be LORA or PROMPT_TUNING", "merge it with PEFT")
    return base._replace(weights=weights, folder=folder, quantized=None, beside=beside)


def _lora(source: FolderSource, keys: Mapping[str, Any], base: Opened, folder: Path) -> LoraSource:
    stems = {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in source.names()}
    modules = {stem.removeprefix(PREFIX) for stem in stems}
    names = {f"{module}.weight" for module in modules}
    layouts = {one: published(base.model, one, tied_copy=False) for one in Layout}
    most = max(layouts, key=lambda one: len(names & layouts[one].keys()))
    for name in sorted(names - layouts[most].keys()):
        rule = f"is changed in {folder}, and its base {base.folder} has no such weight"
        raise CheckpointError(line("tensor", name, rule, f"write the right base into {CONFIG}"))
    expected, changes = {}, {}
    for module in modules:
        shape = layouts[most][f"{module}.weight"].shape
        if len(shape) != 2:
            raise _refuse("target_modules", module, "is no linear", "merge it with PEFT")
        out, width = shape
        rank = _number(keys, "r", "rank_pattern", module)
        alpha = _number(keys, "lora_alpha", "alpha_pattern", module)
        pair = [f"{PREFIX}{module}.lora_{which}.weight" for which in "AB"]
        expected |= dict(zip(pair, ((int(rank), width), (out, int(rank)))))
        changes[f"{module}.weight"] = Change(pair[0], pair[1], alpha / rank)
    check_shapes(source, expected, folder)
    return LoraSource(base.weights, source, imported(base.model, most), changes)


def _number(keys: Mapping[str, Any], key: str, pattern: str, module: str) -> float:
    """A number of a module: that of the pattern that ends its name, or the one of all."""
    found = keys.get(key)
    others = keys.get(pattern) or {}
    if not isinstance(others, dict):
        raise _refuse(pattern, others, "must be an object", "get it again")
    for end, value in others.items():
        if not re.fullmatch(PATTERN, end):
            raise _refuse(pattern, end, "is an expression, and none is run", "write names in full")
        if any(f".{name}".endswith(f".{end}") for name in (module, any_number(module))):
            found = value
            break
    if type(found) not in (int, float) or not 0 < found < math.inf:  # type: ignore[operator]
        raise _refuse(key, found, f"must be a positive number for {module}", "get it again")
    return float(found)  # type: ignore[arg-type]


class LoraSource:
    """A base's tensors with changes of published linears."""

    def __init__(
        self,
        base: TensorSource,
        changes: TensorSource,
        rows: Mapping[str, Rows],
        of: Mapping[str, Change],
    ) -> None:
        """rows: the base's tensors as rows of published ones; of: published name -> change."""
        self._base, self._changes, self._rows, self._of = base, changes, rows, of

    def names(self) -> list[str]:
        return self._base.names()

    def info(self, name: str) -> TensorInfo:
        return self._base.info(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        pieces = self._rows[name].pieces if name in self._rows else ()
        if not any(piece.name in self._of for piece in pieces):
            return self._base.read(name, start, stop)
        is_stack = len(self._base.info(name).shape) == 3  # experts: a piece is one's matrix
        if is_stack:
            weight, pieces = self._base.read(name, start, stop), pieces[start:stop]
        else:
            weight = self._base.read(name)
        merged = weight.float()
        at = merged.view(-1, merged.shape[-1])
        first = 0
        for piece in pieces:
            last = first + piece.stop - piece.start
            if piece.name in self._of:
                a, b, scale = self._of[piece.name]
                part = self._changes.read(b, piece.start, piece.stop).float()
                at[first:last] += scale * (part @ self._changes.read(a).float())
            first = last
        merged = merged.to(weight.dtype)
        return merged if is_stack else merged[start:stop].clone()


def _refuse(key: str, value: Any, rule: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{CONFIG}: " + line(key, value, rule, remedy))
