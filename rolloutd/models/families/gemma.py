"""Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

from typing import Any

from rolloutd.models.description import DecoderConfig, LayerNorms

from .base import activation, describe, refuse, rope, ropes_by_type, windows_by_type

_NORMS = LayerNorms(
    post_attention="post_attention_layernorm", mlp="pre_feedforward_layernorm", post_mlp="post_feedforward_layernorm"
)


def gemma2(hf: Any) -> DecoderConfig:
    """Return a Gemma whose attention scores are soft-capped."""
    name = "Gemma2ForCausalLM"
    return _gemma(name, hf, attention_softcap=hf.attn_logit_softcapping, ropes=(rope(name, hf),))


def gemma3(hf: Any) -> DecoderConfig:
    """Return a Gemma with normalised query and key heads, and one RoPE for sliding layers, one for full ones."""
    name = "Gemma3ForCausalLM"
    refuse(name, hf, "attn_logit_softcapping")  # a field of its config that transformers' Gemma 3 does not apply
    return _gemma(name, hf, qk_norm="head", **ropes_by_type(name, hf))


def _gemma(name: str, hf: Any, **switches: Any) -> DecoderConfig:
    refuse(name, hf, "use_bidirectional_attention")
    bias = bool(hf.attention_bias)
    return describe(
        name,
        hf,
        windows=windows_by_type(name, hf),
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        qkv_bias=bias,
        o_bias=bias,
        norms=_NORMS,
        norm_offset=1.0,
        norm_rounds_last=True,
        activation=activation(name, hf, "hidden_activation"),
        embedding_scale=hf.hidden_size**0.5,
        embedding_scale_rounds=True,
        logits_softcap=hf.final_logit_softcapping,
        **switches,
    )
