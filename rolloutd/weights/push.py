"""The sending half of a weight update: named tensors to specs and a manifest, one tensor at a time.

Whoever copies the bytes takes their digest, in the same pass where they lie in host memory, and records it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rolloutd.errors import ManifestMismatch, check_choice

from .lora import check_peft_config, scaling_from_config
from .manifest import ITEM_BYTES, LoraSpec, TensorSpec, WeightManifest
from .names import canonical_name, split_lora_name
from .tensors import spec_of

NamedTensors: TypeAlias = "Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]"
"""A state dict, or (name, tensor) pairs, consumed once and one at a time."""


class Push:
    """Walks named tensors once; `manifest` knows every digest that was recorded."""

    def __init__(
        self, named_tensors: NamedTensors, lora_spec: LoraSpec | None, dtype: torch.dtype | None = None
    ) -> None:
        self.lora_spec = lora_spec
        self._named_tensors = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
        self.total_bytes: int | None = None
        """Known beforehand only of a mapping or a list."""
        if isinstance(named_tensors, (Mapping, list, tuple)):
            self.total_bytes = sum(tensor.nbytes for _, tensor in self._named_tensors)
        self._dtype = dtype
        self.num_sent_bytes = 0
        """That travelled; fewer than the tensors' where deltas did."""
        self._digests: dict[str, Callable[[], int]] = {}
        self._seen: set[str] = set()
        self._num_bytes = 0
        self._manifest: WeightManifest | None = None

    @property
    def kind(self) -> Literal["full", "lora"]:
        """What is pushed: every parameter, or an adapter."""
        return "full" if self.lora_spec is None else "lora"

    @classmethod
    def full(cls, named_tensors: NamedTensors, dtype: torch.dtype | str | None = None) -> Push:
        """A push of every parameter, cast to `dtype` one at a time; `ConfigError` for one that weights cannot have."""
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        check_choice("dtype", name, ITEM_BYTES, or_none=True)
        return cls(named_tensors, None, None if name is None else getattr(torch, name))

    @classmethod
    def lora(
        cls,
        named_tensors: NamedTensors,
        peft_config: Any,
        *,
        scaling: Mapping[str, float] | None,
        mode: Literal["exact", "merged"],
    ) -> Push:
        """A push of one adapter; `LoraUnsupported` names what of `peft_config` cannot be served."""
        check_choice("mode", mode, ("exact", "merged"))
        config = dict(peft_config) if isinstance(peft_config, Mapping) else dict(peft_config.to_dict())
        check_peft_config(config)
        if scaling is not None:
            spec = LoraSpec({canonical_name(path): float(factor) for path, factor in scaling.items()}, mode)
            return cls(named_tensors, spec)
        pairs = list(named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors)
        ranks = {}
        for name, tensor in pairs:
            split = split_lora_name(canonical_name(name))
            if split is not None and split[1] == "A":
                ranks[split[0]] = int(tensor.shape[0])
        return cls(pairs, LoraSpec(scaling_from_config(config, ranks), mode))

    def device(self) -> torch.device | None:
        """Return where the first tensor lies, which is asked for now; None where there is no tensor."""
        pairs = iter(self._named_tensors)
        first = list(islice(pairs, 1))
        self._named_tensors = chain(first, pairs)
        return first[0][1].device if first else None

    def tensors(self) -> Iterator[tuple[TensorSpec, Tensor]]:
        """Yield each tensor with its spec, in the dtype that is sent; it is valid until the next one is asked for."""
        for name, tensor in self._named_tensors:
            tensor = tensor.detach()
            if self._dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(self._dtype)
            spec = spec_of(canonical_name(name), tensor)
            if spec.name in self._seen:
                raise ManifestMismatch(f"{spec.name} came twice. Send each parameter once.")
            self._seen.add(spec.name)
            yield spec, tensor

    def record(self, spec: TensorSpec, digest: Callable[[], int], num_sent_bytes: int | None = None) -> None:
        """Note what gives the digest of a tensor that was sent, and how many bytes it took if not its own."""
        self._digests[spec.name] = digest
        self._manifest = None
        self._num_bytes += spec.num_bytes
        self.num_sent_bytes += spec.num_bytes if num_sent_bytes is None else num_sent_bytes

    def manifest(self) -> WeightManifest:
        """Return names and digests of everything that was sent."""
        if self._manifest is None:
            digests = {name: digest() for name, digest in self._digests.items()}
            self._manifest = WeightManifest(digests, self._num_bytes)
        return self._manifest
