"""Granite 3 and 4 dense models: a Llama with four factors."""

from __future__ import annotations

from typing import Any

from rolloutd.models.description import DecoderConfig

from .base import describe


def granite(hf: Any) -> DecoderConfig:
    """Return a Llama whose embeddings, residual additions, attention scores and logits are scaled."""
    bias = bool(hf.attention_bias)
    return describe(
        "GraniteForCausalLM",
        hf,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(hf.mlp_bias),
        attention_scale=float(hf.attention_multiplier),
        embedding_scale=float(hf.embedding_multiplier),
        residual_scale=float(hf.residual_multiplier),
        logits_divisor=float(hf.logits_scaling),
    )
