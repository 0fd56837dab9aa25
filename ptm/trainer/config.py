"""Settings of the training loop: how long, how fast, how much at once."""

from __future__ import annotations

from ptm.common.config import Choice, config, ranged


class ObjectiveKind(Choice):
    """Training modes: each a source of batches and an objective (ptm/modes.py)."""

    pretrain = "pretrain"
    sft = "sft"
    dpo = "dpo"
    grpo = "grpo"


BY_TOKEN = (ObjectiveKind.dpo, ObjectiveKind.grpo)
"""Modes whose loss is of each token's log-probability."""


class Schedule(Choice):
    cosine = "cosine"
    constant = "constant"


class Precision(Choice):
    bf16 = "bf16"
    fp32 = "fp32"


class Recompute(Choice):
    none = "none"
    block = "block"


@config
class TrainConfig:
    steps: int = ranged(318_000, least=1)
    "Updates of the weights in the whole run."
    lr: float = ranged(1e-4, above=0.0, most=10.0)
    "Peak learning rate."
    min_lr: float = ranged(0.1, least=0.0, most=1.0)
    "Learning rate at the end, as a fraction of the peak."
    warmup_steps: int = ranged(6_400, least=0)
    "Steps over which the learning rate rises from zero."
    schedule: Schedule = Schedule.cosine
    "Shape of the learning rate after warm-up."
    seq_len: int = ranged(4096, least=2, most=2**20)
    "Tokens in a row."
    batch_tokens: int = ranged(1536 * 4096, least=2)
    """Tokens in a step, over all ranks; a multiple of seq_len. The number of micro-batches follows
    from it."""
    micro_batch_size: int = ranged(2, least=1, most=65_536)
    "Rows in one forward and backward on one rank: lower it to save memory, nothing else changes."
    seed: int = ranged(1234, least=0, most=2**31 - 1)
    "Seed of the weights, the order of data, and dropout."
    clip: float = ranged(1.0, least=0.0)
    "Largest gradient norm; 0 does not clip."
    precision: Precision = Precision.bf16
    """Format of weights and activations in forward and backward; masters and optimizer states are
    always fp32."""
    recompute: Recompute = Recompute.none
    "Activation checkpointing: keep everything, or only the input of each block."
    max_skipped: int = ranged(10, least=0)
    """Steps in a row that may be skipped for a non-finite gradient before the run stops with code
    76."""
    init_from: str | None = None
    """Folder of a published model or a checkpoint to take the first weights from; none starts from
    random ones."""
