"""What a native decoder is: one frozen description, with a switch for each thing in which the families differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: how positions turn into angles."""

    rope_type: str
    theta: float
    rotary_dim: int
    """How many dimensions of a head are rotated; the rest passes by."""
    max_positions: int | None
    """Length beyond which the frequencies would change, also those of tokens already cached; None: never."""
    layer_type: str | None
    """Key of the parameters in a Hugging Face config that has several kinds of layers; None: it has one."""
    hf_config: Any
    """The Hugging Face config, from which transformers' own functions compute scaled frequencies."""


@dataclass(frozen=True, kw_only=True)
class LayerNorms:
    """Hugging Face names of a layer's norms by their place; None where a family has none."""

    attention: str | None = "input_layernorm"
    post_attention: str | None = None
    mlp: str | None = "post_attention_layernorm"
    post_mlp: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """How checkpoints name what is one tensor of all experts in the trainer's module."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A mixture of experts in place of the MLP."""

    layers: tuple[bool, ...]
    """Per layer: experts, or a dense MLP."""
    num_experts: int
    num_chosen: int
    """Experts that a token goes through."""
    expert_size: int
    shared_size: int | None
    """Width of an expert that every token goes through, weighed by a sigmoid (Qwen2-MoE); None: there is none."""
    normalize: bool
    """The weights of the chosen experts are divided by their sum."""
    weights_in_fp32: bool
    """The weights of the chosen experts stay in fp32 (Mixtral), or are rounded as the router's logits are."""
    names: ExpertNames


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a decoder-only model with RMSNorm, grouped-query attention and a gated MLP.

    A switch's default is what Llama does.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    windows: tuple[int | None, ...]
    """Per layer: how many tokens back attention reaches, itself included; None reaches all."""
    ropes: tuple[RopeConfig, ...]
    rope_of_layer: tuple[int | None, ...]
    """Per layer: which of `ropes`; None leaves queries and keys as they are (SmolLM3)."""
    attention_scale: float
    """Factor of the attention scores."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    """Query, key and value are one parameter, gate and up are one (Phi-3)."""
    norms: LayerNorms = field(default_factory=LayerNorms)
    norm_offset: float = 0.0
    """Added to the weights of norms, in fp32 (Gemma: 1)."""
    norm_rounds_last: bool = False
    """Norms multiply by their weight in fp32 and round after it (Gemma, OLMo), not before it."""
    qk_norm: Literal["head", "projection"] | None = None
    """RMSNorm of queries and keys before RoPE: each head by itself (Qwen3, Gemma 3), or all heads as one (OLMo)."""
    rope_rounds_last: bool = False
    """Queries and keys are rotated in fp32 and rounded after it (OLMo); else the angles are rounded first."""
    attention_softcap: float | None = None
    """Attention scores s become softcap * tanh(s / softcap) (Gemma 2)."""
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    """Factor of the token embeddings (Gemma, Granite); the output head does not have it."""
    embedding_scale_rounds: bool = False
    """That factor is rounded to the embeddings' dtype first (Gemma)."""
    residual_scale: float = 1.0
    """Factor of what a block adds to the residual stream (Granite)."""
    logits_divisor: float = 1.0
    """What logits are divided by (Granite)."""
    logits_softcap: float | None = None
    """Logits z become softcap * tanh(z / softcap) (Gemma)."""
    moe: MoeConfig | None = None
