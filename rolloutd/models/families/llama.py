"""Llama 2 and 3."""

from __future__ import annotations

from typing import Any

from rolloutd.models.description import DecoderConfig

from .base import describe


def llama(hf: Any) -> DecoderConfig:
    """Return the plain decoder; `attention_bias` and `mlp_bias` put biases on all of a block's maps."""
    bias = bool(hf.attention_bias)
    return describe("LlamaForCausalLM", hf, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.mlp_bias))
