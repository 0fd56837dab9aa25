"""What `ptm export` needs to know of a model: a seam, so that one exporter takes all of them.

A walk names the linears as the export does, reads the weights, and goes through the layers one at a
time. ptm/export/m32.py has ours and the published M32, ptm/export/ordinary.py Llama, Mixtral,
Qwen2-MoE and Qwen3-MoE.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ptm.export.calibrate import Text
from ptm.export.crew import Crew
from ptm.export.stages import Done, Stage
from ptm.quant.config import Layers


class Walk(Protocol):
    """A model, layer by layer. Made by `open_walk`; used by ptm/export/quantize.py."""

    folder: Path
    tokenizer: Path
    num_layers: int
    vocab_size: int
    max_positions: int
    isolate_documents: bool
    num_experts: int
    experts_per_token: int
    dtype: torch.dtype
    "Of the tensors that are not quantized."
    scale_dtype: torch.dtype

    def shape(self, name: str) -> tuple[int, ...]: ...

    def names(self) -> list[str]:
        """Every tensor of the export before anything is quantized; a layer's begin with
        `model.layers.I.`."""
        ...

    def linears(self, layers: Layers) -> dict[str, tuple[int, int]]:
        """Those to quantize, without `.weight`, and their shapes (N, K)."""
        ...

    def left(self, layers: Layers) -> list[str]:
        """Modules that a reader may take for quantized, and are not."""
        ...

    def read(self, name: str) -> Tensor: ...

    def text(self, ids_RL: Tensor, documents_RL: Tensor, micro_batch_size: int) -> Text: ...

    def embed(self, text: Text) -> list[Tensor]: ...

    def routed_rows(self, text: Text, advance: Callable[[], None], crew: Crew) -> Tensor:
        """Tokens of each row that chose each expert, (layers, R, E); `advance` after a layer."""
        ...

    def stages(
        self,
        layer: int,
        rows: list[Tensor],
        text: Text,
        crew: Crew,
        *,
        twin_rows: list[Tensor] | None,
        least_rows: int,
    ) -> Generator[Stage, None, Done]: ...

    def config(self, folder: Path) -> dict[str, Any]:
        """Keys of config.json; also writes the tokenizer's files into the folder."""
        ...

    def quantization(self, keys: dict[str, Any]) -> dict[str, Any]:
        """quantization_config with what the readers of this model want beside it."""
        ...

    def generation_config(self) -> dict[str, Any]: ...
