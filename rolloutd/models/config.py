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


def check_architecture(architectures: list[str] | None, model: str) -> str:
    """Return the architecture if it is supported; else raise `ModelUnsupported` with the list of what is."""
    name = architectures[0] if architectures else None
    if name not in FAMILIES:
        raise ModelUnsupported(
            f"{model!r} is a {name or 'model whose config.json names no architecture'}; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}. Use a model of one of these."
        )
    return name


def decoder_config(architecture: str, hf: Any) -> DecoderConfig:
    """Return the description of a supported model; an option that would change its numbers unnoticed is an error."""
    return FAMILIES[architecture](hf)
