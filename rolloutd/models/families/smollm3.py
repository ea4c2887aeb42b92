"""SmolLM3: a Llama of which some layers have no RoPE, and may have a window."""

from __future__ import annotations

from typing import Any

from rolloutd.errors import ModelUnsupported
from rolloutd.models.description import DecoderConfig

from .base import describe, windows_by_type


def smollm3(hf: Any) -> DecoderConfig:
    """Return the decoder; sliding layers that `use_sliding_window` denies are refused: attention kernels disagree."""
    name, bias = "SmolLM3ForCausalLM", bool(hf.attention_bias)
    windows = windows_by_type(name, hf)
    if any(windows) and not hf.use_sliding_window:
        raise ModelUnsupported(f"{name} with sliding layer_types and use_sliding_window=False. Correct config.json.")
    if len(hf.no_rope_layers) != hf.num_hidden_layers:
        raise ModelUnsupported(f"{name} with no_rope_layers={hf.no_rope_layers}. Give one entry for each layer.")
    return describe(
        name,
        hf,
        windows=windows,
        rope_of_layer=tuple(0 if rotates else None for rotates in hf.no_rope_layers),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(hf.mlp_bias),
    )
