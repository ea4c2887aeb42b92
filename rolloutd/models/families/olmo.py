"""OLMo 2 and OLMo 3: norms after the blocks, and over whole queries and keys."""

from __future__ import annotations

from typing import Any

from rolloutd.models.description import DecoderConfig, LayerNorms

from .base import describe, ropes_by_type, windows_by_type

_NORMS = LayerNorms(
    attention=None, post_attention="post_attention_layernorm", mlp=None, post_mlp="post_feedforward_layernorm"
)


def olmo2(hf: Any) -> DecoderConfig:
    """Return an OLMo whose layers all attend to everything."""
    return _olmo("Olmo2ForCausalLM", hf)


def olmo3(hf: Any) -> DecoderConfig:
    """Return an OLMo with sliding and full layers, each kind with its own RoPE."""
    name = "Olmo3ForCausalLM"
    return _olmo(name, hf, windows=windows_by_type(name, hf), **ropes_by_type(name, hf))


def _olmo(name: str, hf: Any, **switches: Any) -> DecoderConfig:
    bias = bool(hf.attention_bias)
    return describe(
        name,
        hf,
        qkv_bias=bias,
        o_bias=bias,
        norms=_NORMS,
        norm_rounds_last=True,
        qk_norm="projection",
        rope_rounds_last=True,
        **switches,
    )
