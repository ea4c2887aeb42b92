"""Rotary position tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rolloutd.errors import ConfigError

from .description import RopeConfig


@dataclass(frozen=True)
class RotaryTable:
    """cos and sin of every position, [max_model_len, 1, rotary dim], fp32."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, rope: RopeConfig, max_model_len: int, device: torch.device) -> RotaryTable:
        """Return the tables up to `max_model_len`; `ConfigError` where the frequencies would change on the way."""
        if rope.max_positions is not None and max_model_len > rope.max_positions:
            raise ConfigError(
                f"max_model_len={max_model_len} > {rope.max_positions}: a {rope.rope_type} RoPE changes its "
                "frequencies beyond that, also those of tokens already cached. "
                f"Use --max-model-len {rope.max_positions} or less."
            )
        frequencies, scaling = _frequencies(rope)
        positions = torch.arange(max_model_len, dtype=torch.float32)
        angles = (positions[:, None] * frequencies.float()[None, :]).repeat(1, 2)[:, None, :]
        return cls((angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device))


def _frequencies(rope: RopeConfig) -> tuple[Tensor, float]:
    """Return inverse frequencies [rotary dim / 2] and the factor of cos and sin; transformers computes scaled kinds."""
    if rope.rope_type in ("default", "dynamic"):
        exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
        return 1.0 / rope.theta**exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    by_type = {} if rope.layer_type is None else {"layer_type": rope.layer_type}
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope.rope_type](rope.hf_config, torch.device("cpu"), **by_type)
    return frequencies, float(scaling)
