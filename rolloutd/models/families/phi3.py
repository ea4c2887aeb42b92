"""Phi-3, Phi-3.5 and Phi-4 (also Phi-4-mini), as far as they are `Phi3ForCausalLM`."""

from __future__ import annotations

from typing import Any

from rolloutd.models.description import DecoderConfig

from .base import describe, rope, same_window

_ROPE_TYPES = ("default", "longrope")


def phi3(hf: Any) -> DecoderConfig:
    """Return a Llama with fused parameters that may rotate a part of each head.

    LongRoPE serves up to the length where its frequencies would change; `RotaryTable.build` refuses more.
    """
    name = "Phi3ForCausalLM"
    ropes = (rope(name, hf, types=_ROPE_TYPES, partial=True),)
    return describe(name, hf, fused_projections=True, windows=same_window(hf), ropes=ropes)
