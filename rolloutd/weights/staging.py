"""An update on its way in: bytes land beside what serves, and are verified as they lie there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from rolloutd.errors import DigestMismatch, ManifestMismatch

from .digest import tensor_digest
from .manifest import ITEM_BYTES, TensorSpec, WeightManifest
from .tensors import tensor_from


@dataclass(slots=True)
class _Landing:
    spec: TensorSpec
    data: bytearray
    landed: dict[int, int] = field(default_factory=dict)
    """Offset -> bytes written there."""


class StagedUpdate:
    """Collects the tensors of one update in host memory.

    `check` raises for a spec that the model cannot take; it is asked before memory is reserved.
    """

    def __init__(self, update_id: str, check: Callable[[TensorSpec], None]) -> None:
        self.update_id = update_id
        self._check = check
        self._landings: dict[str, _Landing] = {}

    def write(self, spec: TensorSpec, offset: int, data: memoryview) -> None:
        """Land `data` at byte `offset` of a tensor. Landing the same bytes there again changes nothing."""
        landing = self._landings.get(spec.name)
        if landing is None:
            if spec.dtype not in ITEM_BYTES:
                raise ManifestMismatch(f"{spec.name} has dtype {spec.dtype}; use one of {', '.join(ITEM_BYTES)}.")
            self._check(spec)
            landing = self._landings[spec.name] = _Landing(spec, bytearray(spec.num_bytes))
        if landing.spec != spec:
            raise ManifestMismatch(
                f"{spec.name} came as {spec.dtype} {list(spec.shape)} after {landing.spec.dtype} "
                f"{list(landing.spec.shape)}. Send each tensor with one dtype and shape."
            )
        end = offset + data.nbytes
        if offset < 0 or end > spec.num_bytes:
            raise ManifestMismatch(f"{spec.name}: bytes {offset} to {end} are outside its {spec.num_bytes}.")
        if offset in landing.landed and landing.data[offset:end] != data:
            raise ManifestMismatch(f"{spec.name}: bytes at {offset} came twice and differ. Send each parameter once.")
        landing.data[offset:end] = data
        landing.landed[offset] = data.nbytes

    def verify(self, manifest: WeightManifest) -> dict[str, Tensor]:
        """Return the tensors if all of the manifest, and nothing else, landed whole and with its digest."""
        unexpected = sorted(set(self._landings) - set(manifest.digests))
        missing = sorted(set(manifest.digests) - set(self._landings))
        if unexpected or missing:
            word, names = ("missing", missing) if missing else ("not in the manifest", unexpected)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ManifestMismatch(f"{len(names)} tensors are {word}: {', '.join(names[:3])}{more}. Push again.")
        for name, landing in self._landings.items():
            self._verify_one(name, landing, manifest.digests[name])
        return {name: tensor_from(landing.spec, landing.data) for name, landing in self._landings.items()}

    @staticmethod
    def _verify_one(name: str, landing: _Landing, expected: int) -> None:
        end = 0
        for offset, length in sorted(landing.landed.items()):
            if offset > end:
                break
            end = max(end, offset + length)
        if end < landing.spec.num_bytes:
            raise ManifestMismatch(f"{name} is incomplete: {end} of {landing.spec.num_bytes} bytes landed. Push again.")
        found = tensor_digest(landing.spec, memoryview(landing.data))
        if found != expected:
            raise DigestMismatch(
                f"{name}: the bytes that landed have digest {found:016x}, those sent {expected:016x}. Push again."
            )
