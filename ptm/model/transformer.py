"""The model: embedding, blocks, norm, head. Single-device code that knows no ranks.

    ids -- embed_tokens -- Block x layers -- norm -- lm_head (or the embedding again) -- logits
                           n = norm(x);  x += attention(n)
                           m = norm(x);  x += experts(m)

Parameter names are the published ones, but for the experts, which are stacked: `mlp.experts.w1`,
`mlp.experts.w2`. A new model holds no values: follow with `init_weights`, or load some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptm.common.errors import RecipeError, line
from ptm.kernels.linear import linear
from ptm.kernels.log_probs import linear_log_probs
from ptm.kernels.loss import IGNORED, linear_cross_entropy
from ptm.model import generate
from ptm.model.block import Block
from ptm.model.cache import Cache
from ptm.model.config import ModelConfig, RouterKind
from ptm.model.context import Context, make_context
from ptm.model.embedding import Embedding
from ptm.model.init import new_weight
from ptm.model.norm import RMSNorm
from ptm.model.router import moved_bias


class Loss(NamedTuple):
    """Sums over the tokens that count, and their number: add each up over micro-batches and ranks,
    then divide.

    aux_sum: what is minimised besides, tokens x coefficient x mean over layers of `balance_loss`;
    divided by all tokens, the mean of the micro-batches' balance losses by their tokens.
    """

    nll_sum: Tensor
    tokens: Tensor
    aux_sum: Tensor | None = None
    metrics: Mapping[str, Tensor] = MappingProxyType({})
    "More sums, by name; a training mode may have some."

    @property
    def total(self) -> Tensor:
        """What the backward starts from."""
        return self.nll_sum if self.aux_sum is None else self.nll_sum + self.aux_sum


class Decoder(nn.Module):
    """Everything but the head; holds names, and Transformer drives it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """Made from its section; `device="meta"` gives shapes without memory.

    Inputs are ids (B, L) int64, with optional position_ids, document_ids (-1 is filler) and
    attention_mask (0 is padding) of the same shape; ptm/model/context.py says what they mean.
    """

    expert_counts: Tensor
    router_bias: Tensor | None
    "(layers, E) fp32, part of a checkpoint; None unless the model has such a bias."

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.model = Decoder(config)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(dtype)
        if torch.device(device or "cpu").type != "meta":
            self.to_empty(device=device or "cpu")
        counts = torch.zeros(
            config.num_hidden_layers, config.num_experts, dtype=torch.int64, device=device
        )
        self.register_buffer("expert_counts", counts, persistent=False)
        bias = None
        if config.router_bias_update_rate > 0:
            bias = torch.zeros(counts.shape, dtype=torch.float32, device=device)
        self.register_buffer("router_bias", bias)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter; see ptm/model/init.py."""
        for name, parameter in self.named_parameters():
            parameter.copy_(new_weight(self.config, name, parameter.shape, seed))

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the embedding itself when tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def soft_ids(self) -> list[int]:
        """What to put before each document and prompt: ids of soft tokens, if the model has any."""
        soft = self.model.embed_tokens.soft_tokens
        return [] if soft is None else [-1 - i for i in range(len(soft))]

    def check_ids(self, ids: Tensor) -> None:
        """Raise RecipeError unless the model has all these tokens. For callers from outside, once:
        it waits for the device."""
        if ids.is_meta or not ids.numel():
            return
        least, most = -len(self.soft_ids), self.config.vocab_size - 1
        for found in (int(ids.min()), int(ids.max())):
            if not least <= found <= most:
                rule = f"must be at least {least} and at most {most}, the model's last token"
                remedy = "use the tokenizer that the model was made with"
                raise RecipeError(line("input_ids", found, rule, remedy))

    def hidden(
        self,
        input_ids_BL: Tensor,
        position_ids_BL: Tensor | None = None,
        document_ids_BL: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Rows after the final norm, (B, L, D). Appends to the cache; counts experts in training
        mode."""
        context = make_context(
            self.config,
            input_ids_BL,
            position_ids_BL=position_ids_BL,
            document_ids_BL=document_ids_BL,
            attention_mask_BL=attention_mask_BL,
            cache=cache,
        )
        return self.run(input_ids_BL, context, cache)

    def run(self, input_ids_BL: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        """`hidden` under a context made elsewhere."""
        return self._run(input_ids_BL, context, cache)[0]

    def _run(
        self, input_ids_BL: Tensor, context: Context, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows after the final norm, and the mean over layers of their balance losses, if any."""
        x_BLD = self.model.embed_tokens(input_ids_BL)
        losses = []
        for i, block in enumerate(self.model.layers):
            layer_cache = None if cache is None else cache.layers[i]
            bias_E = None if self.router_bias is None else self.router_bias[i]
            here = context.of_layer(i)
            x_BLD, counts_E, imbalance = block(x_BLD, here, layer_cache, bias_E)
            if self.training:
                self.expert_counts[i] += counts_E
            if imbalance is not None:
                losses.append(imbalance)
        return self.model.norm(x_BLD), torch.stack(losses).mean() if losses else None

    def forward(
        self,
        input_ids_BL: Tensor,
        position_ids_BL: Tensor | None = None,
        document_ids_BL: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V) in the model's type; arguments as for `hidden`. Raises RecipeError for
        ids that the model does not have."""
        self.check_ids(input_ids_BL)
        x_BLD = self.hidden(
            input_ids_BL, position_ids_BL, document_ids_BL, cache, attention_mask_BL
        )
        return linear(x_BLD, self.head_weight)

    def next_logits(
        self,
        input_ids_BL: Tensor,
        cache: Cache | None = None,
        attention_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, V) of what follows each row; arguments as for `hidden`."""
        x_BLD = self.hidden(input_ids_BL, cache=cache, attention_mask_BL=attention_mask_BL)
        return F.linear(x_BLD[:, -1], self.head_weight)

    def loss(self, batch: Any) -> Loss:
        """Cross entropy of a Batch: (B, L) input_ids, labels (already shifted), loss_mask,
        position_ids, document_ids."""
        context = make_context(
            self.config,
            batch.input_ids,
            position_ids_BL=batch.position_ids,
            document_ids_BL=batch.document_ids,
        )
        x_BLD, imbalance = self._run(batch.input_ids, context)
        labels_T = batch.labels.masked_fill(~batch.loss_mask, IGNORED).flatten()
        nll_sum = linear_cross_entropy(x_BLD.flatten(0, 1), self.head_weight, labels_T)
        tokens = batch.loss_mask.sum()
        if imbalance is None:
            return Loss(nll_sum, tokens)
        return Loss(nll_sum, tokens, tokens * imbalance * self.config.router_aux_loss_coef)

    def log_probs(
        self, batch: Any, *, temperature: float = 1.0, routes_BLNA: Tensor | None = None
    ) -> Tensor:
        """Log-probability of each label of a Batch at a temperature, (B, L) fp32; 0 where it is
        masked. routes: the experts of each token by layer, instead of the routers' choice."""
        context = make_context(
            self.config,
            batch.input_ids,
            position_ids_BL=batch.position_ids,
            document_ids_BL=batch.document_ids,
        )
        x_BLD = self.run(batch.input_ids, context._replace(routes_BLNA=routes_BLNA))
        places = batch.loss_mask.nonzero(as_tuple=True)
        found_T = linear_log_probs(
            x_BLD[places], self.head_weight, batch.labels[places], temperature
        )
        out_BL = found_T.new_zeros(batch.labels.shape)
        return out_BL.index_put(places, found_T)

    def take_expert_counts(self) -> Tensor:
        """Rows of real tokens routed since the last call, (layers, E) int64; starts again from
        zero."""
        counts = self.expert_counts.clone()
        self.expert_counts.zero_()
        return counts

    @torch.no_grad()
    def update_router_bias(self, counts_LE: Tensor) -> None:
        """After each step, with its `take_expert_counts` summed over ranks: move the routers' bias
        towards even loads. Nothing where there is no bias."""
        if self.router_bias is not None:
            config = self.config
            is_shared = config.router is RouterKind.shared_expert
            num_shared = config.num_shared_experts if is_shared else 0
            rate = config.router_bias_update_rate
            self.router_bias.copy_(moved_bias(self.router_bias, counts_LE, rate, num_shared))

    def new_cache(self) -> Cache:
        return Cache(self.config.num_hidden_layers)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        **more: Any,
    ) -> Tensor:
        """Prompt and continuation, (B, L + new); more keywords as for ptm/model/generate.py's
        `steps`."""
        new = list(generate.steps(self, input_ids, max_new_tokens, temperature, top_p, **more))
        return torch.cat([input_ids, *(picked.ids_B.unsqueeze(1) for picked in new)], dim=1)

    def stream(self, input_ids: Tensor, max_new_tokens: int, **kwargs: Any) -> Iterator[Tensor]:
        """One (B,) tensor of new ids at a time."""
        return (picked.ids_B for picked in self.steps(input_ids, max_new_tokens, **kwargs))

    def steps(
        self, input_ids: Tensor, max_new_tokens: int, **kwargs: Any
    ) -> Iterator[generate.Picked]:
        """`stream` with the log-probability of each id."""
        return generate.steps(self, input_ids, max_new_tokens, **kwargs)
