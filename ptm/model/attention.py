"""Attention with localized filtering (arXiv 2311.15786, Yuan 2.0): queries and keys are read from
rows that a small causal filter has mixed with their two predecessors, values from the rows
themselves.

    n -- LFA -- z -- q_proj, k_proj -- rope --.
    `------------------- v_proj --------------+-- softmax(q k^T / sqrt(K)) v -- o_proj

NOTE `q_proj` and `k_proj` are not queries and keys. They are the two halves of one matrix whose
rows are, head by head, K rows of queries and K rows of keys: published weights come so, and
`[q_proj z ; k_proj z]` viewed as (H, 2, K) is right.
"""

from __future__ import annotations

from torch import Tensor, nn

from ptm.kernels.attention import causal_attention
from ptm.kernels.lfa import lfa
from ptm.kernels.linear import Linear
from ptm.kernels.prefix import prefix_attention
from ptm.kernels.rope import rope_qk
from ptm.model.cache import LayerCache
from ptm.model.config import LFA_NORM_EPS, ModelConfig
from ptm.model.context import Context
from ptm.model.norm import RMSNorm


class LocalizedFilter(nn.Module):
    """The filter's weights under their published names; Conv2d only holds them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = config.hidden_size
        self.conv1 = nn.Conv2d(hidden, hidden // 2, (2, 1))
        self.conv2 = nn.Conv2d(hidden // 2, hidden, (2, 1))
        self.output_layernorm = RMSNorm(hidden, LFA_NORM_EPS)

    def forward(self, n_BLD: Tensor, connected_BL: Tensor | None) -> Tensor:
        assert self.conv1.bias is not None and self.conv2.bias is not None
        return lfa(
            n_BLD,
            conv1=(self.conv1.weight, self.conv1.bias),
            conv2=(self.conv2.weight, self.conv2.bias),
            norm=self.output_layernorm.weight,
            eps=self.output_layernorm.eps,
            connected_BL=connected_BL,
        )


class Attention(nn.Module):
    prefix_keys: nn.Parameter | None
    prefix_values: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, width = config.hidden_size, config.attention_projection_size
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.attention_dropout
        self.lf_gate = LocalizedFilter(config)
        self.q_proj = Linear(hidden, width, bias=False)
        self.k_proj = Linear(hidden, width, bias=False)
        self.v_proj = Linear(hidden, width, bias=False)
        self.o_proj = Linear(width, hidden, bias=False)
        self.register_parameter("prefix_keys", None)  # an adapter's (ptm/model/adapter.py)
        self.register_parameter("prefix_values", None)

    def forward(self, n_BLD: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        return self.o_proj(self.attend(self.filter(n_BLD, context, cache), n_BLD, context, cache))

    def filter(self, n_BLD: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """The rows that queries and keys are read from, (B, L, D)."""
        if cache is None:
            return self.lf_gate(n_BLD, context.connected_BL)
        return self.lf_gate(cache.filter_input(n_BLD), context.connected_BL)[:, 2:]

    def attend(
        self, z_BLD: Tensor, n_BLD: Tensor, context: Context, cache: LayerCache | None = None
    ) -> Tensor:
        """What o_proj reads, (B, L, H x K)."""
        B, L, _ = n_BLD.shape
        H, K = self.num_heads, self.head_dim
        q_BLV, k_BLV = self.q_proj(z_BLD), self.k_proj(z_BLD)
        q_BHLK, k_BHLK = rope_qk(q_BLV, k_BLV, context.cos_BLR, context.sin_BLR, num_heads=H)
        v_BHLK = self.v_proj(n_BLD).view(B, L, H, K).transpose(1, 2)
        if cache is not None:
            k_BHLK, v_BHLK = cache.append(k_BHLK, v_BHLK)

        dropout = self.dropout if self.training else 0.0
        if self.prefix_keys is None or self.prefix_values is None:
            out_BHLK = causal_attention(q_BHLK, k_BHLK, v_BHLK, context.see_BLS, dropout=dropout)
        else:
            out_BHLK = prefix_attention(
                q_BHLK,
                k_BHLK,
                v_BHLK,
                self.prefix_keys,
                self.prefix_values,
                context.see_BLS,
                dropout=dropout,
            )
        return out_BHLK.transpose(1, 2).reshape(B, L, H * K)
