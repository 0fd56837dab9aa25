"""Hugging Face's Mixtral in the shape of a recipe's model, trained by others: `ptm bench train`.

    mixtral_ddp     torch's DDP; a bf16 model, fp32 masters and moments, torch's fused AdamW
    mixtral_fsdp    torch's FSDP2 as it is (ptm/parallel/fsdp.py, is_stock), fp32 shards
    mixtral_moe     DeepSpeed's ZeRO-2 over a Mixtral whose experts are DeepSpeed-MoE's, shared out
                    over all ranks, no token dropped

Experts of the first two are transformers' `grouped_mm`. Its attention has no filter and its router
is a linear one: the published parts of M32 that Mixtral lacks are work that only ptm does. None of
them lets rows of experts be padded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptm.common.errors import KernelError, line
from ptm.data.pack import Batch
from ptm.engine.outcome import Outcome, agree
from ptm.mesh.mesh import Mesh
from ptm.model.config import ModelConfig
from ptm.optim.adamw import adamw
from ptm.parallel import deepspeed, fsdp
from ptm.recipe import Recipe

PEERS = ("mixtral_ddp", "mixtral_fsdp", "mixtral_moe")


class Summed(NamedTuple):
    """A Loss of ptm/trainer/objectives.py."""

    nll_sum: Tensor
    tokens: Tensor
    total: Tensor
    aux_sum: None = None
    metrics: Mapping[str, Tensor] = MappingProxyType({})


class Mixtral(nn.Module):
    """Mixtral with the loss that `pretrain` asks for."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inner = new_mixtral(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids, use_cache=False).logits

    def loss(self, batch: Batch) -> Summed:
        return summed(self.inner(batch.input_ids, use_cache=False).logits, batch)


def summed(logits: Tensor, batch: Batch) -> Summed:
    """As transformers' own loss: logits in fp32, whole. Every label counts."""
    nll = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum")
    return Summed(nll.detach(), batch.loss_mask.sum(), nll)


def new_mixtral(config: ModelConfig) -> Any:
    """Raises KernelError, with the line that installs it, where transformers is missing."""
    try:
        from transformers import (  # pyright: ignore[reportMissingImports]
            MixtralConfig,
            MixtralForCausalLM,
        )
    except ImportError as error:
        remedy = "pip install -c constraints.txt transformers"
        raise KernelError(line("bench", "train", f"{error}", remedy)) from error
    shape = MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.attention_projection_size // config.num_attention_heads,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
    )
    shape._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    return MixtralForCausalLM(shape)


def make_peer(name: str, recipe: Recipe, mesh: Mesh) -> Any:
    """What Runner trains: the part of the engine seam that a bench needs."""
    if name == "mixtral_fsdp":
        model = Mixtral(recipe.model).to(torch.bfloat16)
        return fsdp.FsdpEngine(
            model,
            units=model.inner.model.layers,
            mesh=mesh,
            config=recipe.engine,
            update=functools.partial(adamw, config=recipe.optim),
            clip=recipe.train.clip,
            is_stock=True,
        )
    return (DataParallel if name == "mixtral_ddp" else DeepspeedMoe)(recipe, mesh)


class Peer:
    """What is the same for peers that are not engines of ptm."""

    model: Any

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.recipe, self.mesh = recipe, mesh
        train = recipe.train
        rows = math.ceil(train.batch_tokens // train.seq_len / mesh.world)
        self.micro_batches = math.ceil(rows / train.micro_batch_size)
        self.of_step = 0

    def drain(self) -> None:
        """Nothing is under way between steps."""

    def report(self) -> dict[str, float]:
        return {}


class DataParallel(Peer):
    """DDP; gradients of a step add up in bf16, and travel with its last micro-batch."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        super().__init__(recipe, mesh)
        whole = Mixtral(recipe.model).to(torch.bfloat16)
        self.params = list(whole.parameters())
        self.masters = [p.detach().float().clone() for p in self.params]
        self.wrapped = nn.parallel.DistributedDataParallel(
            whole, process_group=mesh.dp.get_group(), gradient_as_bucket_view=True
        )
        self.optimizer = torch.optim.AdamW(
            self.masters,
            betas=(recipe.optim.beta1, recipe.optim.beta2),
            eps=recipe.optim.eps,
            weight_decay=recipe.optim.weight_decay,
            fused=True,
        )
        self.model = self

    def train(self) -> None:
        self.wrapped.train()

    def loss(self, batch: Batch) -> Summed:
        self.of_step += 1
        is_last = self.of_step == self.micro_batches
        with contextlib.nullcontext() if is_last else self.wrapped.no_sync():
            return summed(self.wrapped(batch.input_ids), batch)

    def backward(self, loss: Tensor, *, is_last: bool, **_: Any) -> None:
        with contextlib.nullcontext() if is_last else self.wrapped.no_sync():
            (loss / self.recipe.train.batch_tokens * self.mesh.world).backward()

    @torch.no_grad()
    def step(self, *, nll_sum: Tensor, tokens: Tensor, lr: float, flags: list[float]) -> Outcome:
        norm = nn.utils.clip_grad_norm_(self.params, self.recipe.train.clip)
        for master, param in zip(self.masters, self.params):
            assert param.grad is not None
            master.grad = param.grad.float()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        for master, param in zip(self.masters, self.params):
            master.grad = None
            param.copy_(master)
        self.wrapped.zero_grad(set_to_none=False)
        self.of_step = 0
        heard = agree(0.0, nll_sum=nll_sum, tokens=tokens, flags=flags, mesh=self.mesh)
        return heard._replace(grad_norm=float(norm))


class DeepspeedMoe(Peer):
    """ZeRO-2 with experts shared out over all ranks by deepspeed.moe."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        super().__init__(recipe, mesh)
        library = deepspeed.imported(mesh)
        deepspeed.forbid_compiling(library, recipe.engine)
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        whole = Mixtral(recipe.model)
        for layer in whole.inner.model.layers:
            layer.mlp = SharedOut(recipe.model, mesh.world)
        whole.to(torch.bfloat16)
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(whole.parameters()), "name": "all"}
        )
        optimizer = torch.optim.AdamW(
            groups,
            lr=1.0,
            betas=(recipe.optim.beta1, recipe.optim.beta2),
            eps=recipe.optim.eps,
            weight_decay=recipe.optim.weight_decay,
            fused=True,
        )
        numel = sum(p.numel() for p in whole.parameters())
        settings = deepspeed.settings_for(
            recipe.engine,
            stage=2,
            world=mesh.world,
            dtype=torch.bfloat16,
            clip=recipe.train.clip,
            numel=numel,
        )
        self.engine: Any = library.initialize(
            model=whole, optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
        self.model = self

    def train(self) -> None:
        self.engine.train()

    def loss(self, batch: Batch) -> Summed:
        return summed(self.engine(batch.input_ids), batch)

    def backward(self, loss: Tensor, *, is_last: bool, **_: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss / self.recipe.train.batch_tokens * self.mesh.world)

    def step(self, *, nll_sum: Tensor, tokens: Tensor, lr: float, flags: list[float]) -> Outcome:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return agree(0.0, nll_sum=nll_sum, tokens=tokens, flags=flags, mesh=self.mesh)


class SharedOut(nn.Module):
    """DeepSpeed's MoE layer in the place of Mixtral's."""

    def __init__(self, config: ModelConfig, world: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.moe = MoE(
            config.hidden_size,
            SwiGlu(config.hidden_size, config.moe_intermediate_size),
            num_experts=config.num_experts,
            ep_size=world,
            k=config.num_experts_per_tok,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.moe(x_BLD)[0]


class SwiGlu(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def version() -> str:
    """Of the peers' model."""
    try:
        return f"transformers {importlib.metadata.version('transformers')}"
    except importlib.metadata.PackageNotFoundError:
        return "no transformers"
