"""What travels in a weight update: tensor specs, the manifest with their digests, and a LoRA adapter's scaling."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes that weights may have on the wire."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one tensor; its bytes travel dense and little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor, in unbounded integers; KeyError for a dtype not in `ITEM_BYTES`."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """Every tensor of one update with its digest."""

    digests: Mapping[str, int]
    """Canonical name -> 64-bit tensor digest."""
    num_bytes: int

    @property
    def digest(self) -> str:
        """16 hex digits over the sorted (name, digest) pairs: equal weights under equal names give equal digits."""
        text = "".join(f"{name} {value:016x}\n" for name, value in sorted(self.digests.items()))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """How the pairs of an adapter are applied."""

    scaling: Mapping[str, float]
    """Module path, such as `model.layers.0.self_attn.q_proj`, -> factor of B (A x)."""
    mode: Literal["exact", "merged"]
