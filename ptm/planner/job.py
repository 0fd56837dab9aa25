"""What is to be planned: plain numbers from the sections of a recipe, and its model's shapes.

Nothing here knows a formula; ptm/planner/states.py, activations.py and step_time.py do.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from ptm.common.units import MIB
from ptm.engine.layout import Format, Named
from ptm.model.adapter import add_adapter
from ptm.model.config import ModelConfig
from ptm.model.lora_config import ALL_WEIGHTS, AdapterConfig
from ptm.model.transformer import Transformer
from ptm.quant.grid import GridKind
from ptm.quant.rows import RowFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One way to run a recipe. `zero` 0 is open: the search tries 1, 2 and 3."""

    model: ModelConfig
    ranks: int
    seq_len: int
    batch_tokens: int
    micro_batch_size: int
    precision: str
    recompute: str
    has_snapshot: bool
    """Whether checkpoints are written in the background, from a copy."""
    device: str
    zero: int = 0
    ep: int = 1
    chunks: int = 1
    page_bytes: int = 4 * MIB
    is_int8: bool = False
    """Whether the optimizer's moments are kept in int8."""
    update: str = "exact"
    cpu_bytes: int | None = None
    """Budget of the host's memory for pages; None is what is needed, or what is there."""
    gpu_bytes: int | None = None
    ssd_bytes: int | None = None
    has_ssd: bool = False
    journal_every: int = 1
    """Steps between two commits of the ssd tier."""
    adapter: AdapterConfig = ALL_WEIGHTS
    """What is trained, where it is not all."""
    has_log_probs: bool = False
    """Whether the loss is of each token's log-probability (dpo, grpo), not of their sum."""
    shared_ranks: int = 0
    """Ranks of a machine that exchange in memory (ptm/mesh/shared.py), 0 if they do not."""
    frozen_copy: str = ""
    """The key that asks for a frozen copy of the whole model on every rank, if one does."""

    @property
    def compute_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    @property
    def rank_rows(self) -> int:
        """Rows of a step on the rank that has most."""
        return max(1, -(-(self.batch_tokens // self.seq_len) // self.ranks))

    @property
    def micro_rows(self) -> int:
        return min(self.micro_batch_size, self.rank_rows)

    @property
    def micro_batches(self) -> int:
        return -(-self.rank_rows // self.micro_rows)

    @property
    def micro_tokens(self) -> int:
        return self.micro_rows * self.seq_len

    @property
    def format(self) -> Format:
        is_bf16 = self.precision == "bf16"
        return Format(weight_bytes=self.compute_bytes, is_split=is_bf16, is_int8=self.is_int8)


def shapes(model: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of all parameters in order, from a model of one layer without memory."""
    before, block, after = _parts(model, ALL_WEIGHTS, 2)
    named = before + block * model.num_hidden_layers + after
    return [member.shape for member in named]


def units(
    model: ModelConfig, adapter: AdapterConfig, weight_bytes: int
) -> tuple[list[Named], list[Named]]:
    """Parameters of the root and of one block, as the engine groups them."""
    before, block, after = _parts(model, adapter, weight_bytes)
    return before + after, block


def trained(job: Job) -> int:
    """Parameters that have gradients, of all ranks."""
    root, block = (
        sum(math.prod(member.shape) for member in members if not member.is_frozen)
        for members in units(job.model, job.adapter, job.compute_bytes)
    )
    return root + job.model.num_hidden_layers * block


def _parts(
    model: ModelConfig, adapter: AdapterConfig, weight_bytes: int
) -> tuple[list[Named], list[Named], list[Named]]:
    one = _one_layer(replace(model, num_hidden_layers=1), adapter, weight_bytes)
    is_block = [".layers.0." in member.name for member in one]
    first = is_block.index(True)
    last = first + sum(is_block)
    return one[:first], one[first:last], one[last:]


@functools.lru_cache(maxsize=1024)
def _one_layer(model: ModelConfig, adapter: AdapterConfig, weight_bytes: int) -> list[Named]:
    made = Transformer(model, device="meta")
    add_adapter(made, adapter)
    held = rows_held(adapter, weight_bytes)
    return [Named.of(name, parameter, held) for name, parameter in made.named_parameters()]


def rows_held(adapter: AdapterConfig, weight_bytes: int) -> RowFormat | None:
    """How frozen experts are held, where not as weights; an element of pages has weight_bytes."""
    return RowFormat(GridKind(adapter.base), weight_bytes) if adapter.has_codes else None
