"""Recompute: keep only each block's input in the forward, and run the block again in the backward.

One thing is kept besides: which experts each token was sent to. A fifth of the tokens sit close to
a tie between their second and third expert, so a second forward whose arithmetic differs in the
last bit (another kernel, other gathered weights) would route them elsewhere, and the gradient would
be that of another function. The routers choose by argmax or by the kernel router_top, and nothing
else in a block does, so keeping their results keeps the choice: 12 x A bytes per token and layer at
most, beside the 2 x D of the input.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import ptm.kernels.router  # noqa: F401, its ops


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Replace the forward of each block by one that recomputes in training. Names and hooks stay as
    they are."""
    for block in blocks:
        block.forward = functools.partial(_run, block, block.forward)


def _run(block: nn.Module, forward: Any, *args: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_choices)


def _keep_choices(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op is torch.ops.aten.argmax.default or op is torch.ops.ptm.router_top.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
