"""One layer: attention and experts, each behind a norm and beside a residual."""

from __future__ import annotations

from torch import Tensor, nn

from ptm.model.attention import Attention
from ptm.model.cache import LayerCache
from ptm.model.config import ModelConfig
from ptm.model.context import Context
from ptm.model.moe import Mixed, MixtureOfExperts
from ptm.model.norm import RMSNorm


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config)

    def forward(
        self,
        x_BLD: Tensor,
        context: Context,
        cache: LayerCache | None = None,
        router_bias_E: Tensor | None = None,
    ) -> Mixed:
        """The new rows (B, L, D), with the counts and the balance loss of the experts.

        These are returned, not stored, so that a block run again in the backward counts nothing
        twice.
        """
        seen_BLD = self.self_attn(self.input_layernorm(x_BLD), context, cache)
        normed_BLD, x_BLD = self.post_attention_layernorm(seen_BLD, x_BLD)
        mixed = self.mlp(normed_BLD, context.real_BL, router_bias_E, context.routes_TA)
        return mixed._replace(y_BLD=x_BLD + mixed.y_BLD)
