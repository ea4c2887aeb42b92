"""From an architecture's name and its Hugging Face config to a `DecoderConfig`."""

from __future__ import annotations

from typing import Any

from rolloutd.errors import ModelUnsupported

from .description import DecoderConfig, MoeConfig, RopeConfig
from .families import FAMILIES

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "DecoderConfig",
    "MoeConfig",
    "RopeConfig",
    "check_architecture",
    "decoder_config",
]

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)


def check_architecture(architectures: list[str] | None, model: str, model_impl: str = "auto") -> str:
    """Return the architecture; `ModelUnsupported` where there is none, or none that `model_impl` allows.

    What is not native passes under `auto` and `transformers`: whether it runs is seen when it is loaded.
    """
    name = architectures[0] if architectures else None
    if name is None:
        raise ModelUnsupported(f"{model!r} is a model whose config.json names no architecture. Add `architectures`.")
    if model_impl == "native" and name not in FAMILIES:
        raise ModelUnsupported(
            f"{model!r} is a {name}, which is not native, and model_impl='native'. "
            f"Native: {', '.join(SUPPORTED_ARCHITECTURES)}. Use --model-impl auto for transformers' own code."
        )
    return name


def decoder_config(architecture: str, hf: Any) -> DecoderConfig:
    """Return the description of a supported model; an option that would change its numbers unnoticed is an error."""
    return FAMILIES[architecture](hf)
