"""One module per family: what it reads from its Hugging Face config, and which options it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rolloutd.models.description import DecoderConfig

from .gemma import gemma2, gemma3
from .granite import granite
from .llama import llama
from .mistral import mistral, mixtral
from .olmo import olmo2, olmo3
from .phi3 import phi3
from .qwen import qwen2, qwen2_moe, qwen3, qwen3_moe
from .smollm3 import smollm3

FAMILIES: dict[str, Callable[[Any], DecoderConfig]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Phi3ForCausalLM": phi3,
    "Olmo2ForCausalLM": olmo2,
    "Olmo3ForCausalLM": olmo3,
    "GraniteForCausalLM": granite,
    "SmolLM3ForCausalLM": smollm3,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "MixtralForCausalLM": mixtral,
}
"""Architecture, as config.json names it -> the function that describes it."""
