"""The `model` section of a recipe: every number of the architecture, and the rules between them.

Keys carry Hugging Face names where one exists. The defaults are the published Yuan2.0-M32
(arXiv 2405.17976); smaller scales of the same family live in recipes/m32.yaml. Sizes and costs that
follow from the numbers are plain functions here, so that a plan is priced without building a model.
"""

from __future__ import annotations

from ptm.common.config import Choice, config, ranged
from ptm.common.errors import RecipeError, line

LFA_NORM_EPS = 1e-6  # the published code hard-codes it; `rms_norm_eps` sets every other norm


class Scale(Choice):
    """Which size of the family a recipe asks for; `auto` is what the machine can train."""

    auto = "auto"
    full = "full"
    mini = "mini"
    debug = "debug"


class RouterKind(Choice):
    """What picks the experts of a token; see ptm/model/router.py."""

    attention = "attention"
    linear = "linear"
    shared_expert = "shared_expert"


class RopeMode(Choice):
    """Where rotary angles lose precision; see ptm/kernels/rope.py."""

    hf_bf16 = "hf_bf16"
    megatron = "megatron"
    fp32 = "fp32"


@config
class ModelConfig:
    scale: Scale = Scale.auto
    "Size of the model: full (40 B), mini, debug, or auto: full with an accelerator, else mini."
    vocab_size: int = ranged(135_040, least=1)
    "Rows of the embedding; the tokenizer's pieces, padded."
    hidden_size: int = ranged(2048, least=1)
    "Width of the residual stream."
    num_hidden_layers: int = ranged(24, least=1)
    "Blocks of attention and experts."
    num_attention_heads: int = ranged(16, least=1)
    "Attention heads; each key has its own (no grouping)."
    attention_projection_size: int = ranged(4096, least=1)
    "Width of queries, keys and values over all heads; divided by the heads, the head size."
    num_experts: int = ranged(32, least=1)
    "Experts in each layer, shared ones included."
    num_experts_per_tok: int = ranged(2, least=1)
    "Experts that each token visits, shared ones included."
    num_shared_experts: int = ranged(1, least=1)
    "Experts that every token visits; for router=shared_expert only."
    moe_intermediate_size: int = ranged(8192, least=1)
    "Hidden width of one expert."
    router: RouterKind = RouterKind.attention
    "What picks experts: attention (Yuan2.0-M32), linear (classical), shared_expert (DeepSeekMoE)."
    router_aux_loss_coef: float = ranged(0.0, least=0.0)
    """Weight of the balance loss of the experts, per layer num_experts_per_tok when even and scaled
    as Hugging Face's; 0 is none."""
    router_bias_update_rate: float = ranged(0.0, least=0.0)
    """How far each step moves the bias by which experts with few rows are preferred, without a
    loss (arXiv 2408.15664); 0.001 there; 0 is no bias."""
    rms_norm_eps: float = ranged(1e-6, above=0.0)
    "Added to the mean square in every RMSNorm but that of the localized filter, which keeps 1e-6."
    rope_theta: float = ranged(10_000.0, above=1.0)
    "Base of the rotary frequencies; the published 16K weights want 40890."
    rope_mode: RopeMode = RopeMode.fp32
    "Precision of rotary angles: fp32 to train, megatron for published weights, hf_bf16 as HF code."
    max_position_embeddings: int = ranged(4096, least=1)
    "Longest sequence, in tokens."
    tie_word_embeddings: bool = True
    "Whether the output matrix is the embedding."
    isolate_documents: bool = True
    "Whether packed documents are hidden from each other; false only restarts positions."
    initializer_range: float = ranged(0.02, above=0.0)
    "Standard deviation of new weights; output projections divide it by sqrt(2 x layers)."
    attention_dropout: float = ranged(0.0, least=0.0, below=1.0)
    "Share of attention weights dropped in training."

    def check(self) -> None:
        """Raise RecipeError for numbers that cannot go together."""
        hidden, heads = self.hidden_size, self.num_attention_heads
        width = self.attention_projection_size
        if hidden % (2 * heads):
            rule = f"must be a multiple of 2 x model.num_attention_heads={heads} (rotary pairs)"
            raise RecipeError(line("model.hidden_size", hidden, rule, "change either"))
        if width % heads:
            rule = f"must be a multiple of model.num_attention_heads={heads}"
            raise RecipeError(line("model.attention_projection_size", width, rule, "change either"))
        if self.rotary_dim > self.head_dim:
            rule = (
                f"must be at least model.hidden_size={hidden}: each head turns hidden / heads dims"
            )
            raise RecipeError(line("model.attention_projection_size", width, rule, "raise it"))
        if self.num_experts_per_tok > self.num_experts:
            rule = f"must be at most model.num_experts={self.num_experts}"
            raise RecipeError(
                line("model.num_experts_per_tok", self.num_experts_per_tok, rule, "change either")
            )
        least = self.num_shared_experts + 1
        if self.router is RouterKind.shared_expert and self.num_experts_per_tok < least:
            rule = f"must be at least {least} with model.num_shared_experts={least - 1}, one routed"
            raise RecipeError(
                line("model.num_experts_per_tok", self.num_experts_per_tok, rule, "raise it")
            )

    @property
    def head_dim(self) -> int:
        return self.attention_projection_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Leading dims of each head that rotary embedding turns; the rest pass through."""
        return self.hidden_size // self.num_attention_heads


def num_parameters(config: ModelConfig) -> int:
    """Weights of the whole model; 39,942,842,368 for the published one."""
    matrices = 1 if config.tie_word_embeddings else 2
    layers = config.num_hidden_layers * _layer_parameters(config, experts=config.num_experts)
    return matrices * _vocabulary_parameters(config) + layers + config.hidden_size


def active_parameters(config: ModelConfig) -> int:
    """Weights that one token meets, with one vocabulary matrix; 3,704,055,808 as published."""
    layers = config.num_hidden_layers * _layer_parameters(
        config, experts=config.num_experts_per_tok
    )
    return _vocabulary_parameters(config) + layers + config.hidden_size


def expert_parameters(config: ModelConfig) -> int:
    """Weights of one expert in one layer."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Two per active weight, plus causal attention averaged over `seq_len` positions."""
    scores = 2 * config.num_hidden_layers * config.attention_projection_size * seq_len
    return 2 * active_parameters(config) + scores


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward: three times the forward. Recomputed work does not count."""
    return 3 * forward_flops_per_token(config, seq_len)


def _vocabulary_parameters(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def _layer_parameters(config: ModelConfig, *, experts: int) -> int:
    hidden = config.hidden_size
    half = hidden // 2
    attention = 4 * hidden * config.attention_projection_size
    # Two convolutions of width 2, their biases and a norm.
    filters = 2 * (2 * hidden * half) + half + hidden + hidden
    scored = config.num_experts
    if config.router is RouterKind.shared_expert:
        scored -= config.num_shared_experts
    router = (3 if config.router is RouterKind.attention else 1) * scored * hidden
    return attention + filters + router + experts * expert_parameters(config) + 2 * hidden
