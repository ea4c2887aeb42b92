"""From a checkpoint's config to a `Model`: which architectures are native, and how one is built."""

from __future__ import annotations

from typing import Any

import torch

from rolloutd.config import EngineConfig
from rolloutd.errors import ConfigError
from rolloutd.runtime.ops import Ops
from rolloutd.runtime.row_invariant import RowInvariantOps
from rolloutd.weights.packing import Precision

from .config import check_architecture, decoder_config
from .native import NativeModel


def build_model(
    config: EngineConfig, architecture: str, hf_config: Any, precision: Precision, device: torch.device
) -> tuple[NativeModel, int]:
    """Return the model and the context length that it is built for; `ModelUnsupported` names what is not known."""
    decoder = decoder_config(check_architecture([architecture], config.model), hf_config)
    max_model_len = resolve_max_model_len(config, decoder.max_position_embeddings)
    ops = RowInvariantOps() if config.deterministic else Ops()
    return NativeModel(decoder, precision, ops, max_model_len, device), max_model_len


def resolve_max_model_len(config: EngineConfig, positions: int) -> int:
    """Return the context length; `ConfigError` where more is asked for than the model has positions."""
    if config.max_model_len is None:
        return positions
    if config.max_model_len > positions:
        raise ConfigError(
            f"max_model_len={config.max_model_len} > {positions}, the model's positions. "
            f"Use --max-model-len {positions} or less."
        )
    return config.max_model_len
