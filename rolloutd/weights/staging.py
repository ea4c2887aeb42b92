"""An update on its way in: bytes land beside what serves, and are verified as they lie there."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from rolloutd.errors import DigestMismatch, ManifestMismatch

from .digest import Digest, tensor_digest
from .manifest import ITEM_BYTES, TensorSpec, WeightManifest
from .tensors import tensor_from

_NUM_NAMED = 3
"""Tensors that a message names before it counts the rest."""


class Place(Protocol):
    """Where a version is put together while its tensors come."""

    def of(self, spec: TensorSpec) -> memoryview | None:
        """Return the memory that a tensor will serve from; None where it is cast or moved on its way there."""
        ...

    def filled(self, spec: TensorSpec) -> None:
        """Take note that all bytes of that memory have landed."""
        ...

    def add(self, spec: TensorSpec, data: memoryview) -> None:
        """Cast or move a whole tensor to where it will serve from."""
        ...


class StagedUpdate:
    """Collects the tensors of one update beside what serves.

    `check` raises for a spec that the model cannot take; it is asked before memory is reserved. With a `place` tensors
    land where they will serve from, as far as they can; else they lie in host memory until `verify`.
    """

    def __init__(self, update_id: str, check: Callable[[TensorSpec], None], place: Place | None = None) -> None:
        self.update_id = update_id
        self._check = check
        self._place = place
        self._landings: dict[str, _Landing] = {}
        self._added: dict[str, tuple[TensorSpec, int]] = {}
        """Tensors that came whole and were cast or moved, with their digests."""

    def write(self, spec: TensorSpec, offset: int, data: memoryview) -> int | None:
        """Land `data` at byte `offset` of a tensor, in any order; equal bytes may land again.

        Returns the digest of a tensor that came in one piece. Raises `ManifestMismatch`, and lands nothing, for a spec
        that cannot be taken, a range outside the tensor, and bytes that differ from those that landed there before.
        """
        if spec.name in self._added:
            return self._add_again(spec, data)
        landing = self._landings.get(spec.name)
        if landing is None:
            memory = self._reserve(spec)
            if memory is None and offset == 0 and data.nbytes == spec.num_bytes > 0 and not data.readonly:
                assert self._place is not None
                digest = tensor_digest(spec, data)
                self._place.add(spec, data)
                self._added[spec.name] = spec, digest
                return digest
            landing = self._landings[spec.name] = _Landing(spec, memory or _host_memory(spec))
        if landing.spec != spec:
            raise ManifestMismatch(
                f"{spec.name} came as {spec.dtype} {list(spec.shape)} after {landing.spec.dtype} "
                f"{list(landing.spec.shape)}. Send each tensor with one dtype and shape."
            )
        end = offset + data.nbytes
        if offset < 0 or end > spec.num_bytes:
            raise ManifestMismatch(
                f"{spec.name}: bytes {offset} to {end} are outside its {spec.num_bytes}. Cut it within its size."
            )
        if landing.land(offset, data) and landing.is_in_place:
            assert self._place is not None
            self._place.filled(spec)
        return landing.digest() if data.nbytes == spec.num_bytes else None

    def specs(self) -> tuple[TensorSpec, ...]:
        """Return every tensor that landed."""
        return (*(landing.spec for landing in self._landings.values()), *(spec for spec, _ in self._added.values()))

    def _add_again(self, spec: TensorSpec, data: memoryview) -> int:
        before, digest = self._added[spec.name]
        if before != spec or data.nbytes != spec.num_bytes or tensor_digest(spec, data) != digest:
            raise ManifestMismatch(f"{spec.name} came twice and differs. Send each parameter once.")
        return digest

    def verify(self, manifest: WeightManifest) -> dict[str, Tensor]:
        """Return the tensors if all of the manifest, and nothing else, landed whole and with its digest.

        The digests are those of the bytes as they lie where they landed; the tensors are views of host memory. What is
        in its place already is not among them.
        """
        arrived = self._landings.keys() | self._added.keys()
        missing = sorted(manifest.digests.keys() - arrived)
        if missing:
            raise ManifestMismatch(
                f"{len(missing)} of {len(manifest.digests)} tensors never landed: {_shortened(missing)}. "
                "Push again, every tensor of the manifest."
            )
        unexpected = sorted(arrived - manifest.digests.keys())
        if unexpected:
            raise ManifestMismatch(
                f"{len(unexpected)} tensors landed that the manifest does not list: {_shortened(unexpected)}. "
                "Push again, with a manifest of all that is sent."
            )
        for name, landing in self._landings.items():
            landing.verify(manifest.digests[name])
        for name, (_, digest) in self._added.items():
            compare(name, digest, manifest.digests[name])
        return {
            name: tensor_from(landing.spec, landing.memory)
            for name, landing in self._landings.items()
            if not landing.is_in_place
        }

    def _reserve(self, spec: TensorSpec) -> memoryview | bytearray | None:
        """Return memory for a tensor that the model can take; None where it may be handed on if it comes whole."""
        if spec.dtype not in ITEM_BYTES:
            raise ManifestMismatch(f"{spec.name} has dtype {spec.dtype}; use one of {', '.join(ITEM_BYTES)}.")
        if min(spec.shape, default=0) < 0:
            raise ManifestMismatch(f"{spec.name} has shape {list(spec.shape)}; no size may be negative.")
        self._check(spec)
        return _host_memory(spec) if self._place is None else self._place.of(spec)


def _host_memory(spec: TensorSpec) -> bytearray:
    try:
        return bytearray(spec.num_bytes)
    except (MemoryError, OverflowError):
        raise ManifestMismatch(
            f"{spec.name} {list(spec.shape)} needs {spec.num_bytes} bytes of host memory, which are not to be had. "
            "Free memory on the daemon's host, or send a smaller tensor."
        ) from None


class _Landing:
    """The memory of one tensor, and which parts of it have landed."""

    def __init__(self, spec: TensorSpec, memory: memoryview | bytearray) -> None:
        self.spec = spec
        self.memory = memory
        self.is_in_place = isinstance(memory, memoryview)
        """It will serve from there."""
        self._extents: list[tuple[int, int]] = []
        """(start, stop) of what landed: sorted, and neither overlapping nor touching."""
        self._digest = Digest(spec)
        self._num_digested = 0
        """Bytes that came in order, digested in the pass that copied them."""

    def land(self, offset: int, data: memoryview) -> bool:
        """Land bytes; return whether these were the last that were missing."""
        if data.nbytes == 0:
            return False
        end = offset + data.nbytes
        first = bisect_left(self._extents, offset, key=lambda extent: extent[1])
        last = bisect_right(self._extents, end, key=lambda extent: extent[0])
        neighbours = self._extents[first:last]
        missing = self.num_missing
        # Released also by an error, whose traceback would otherwise keep the sender's shared memory mapped.
        with memoryview(self.memory) as landed, data.cast("B") as arrived:
            for start, stop in neighbours:
                low, high = max(start, offset), min(stop, end)
                if landed[low:high] != arrived[low - offset : high - offset]:
                    raise ManifestMismatch(
                        f"{self.spec.name}: bytes {low} to {high} came twice and differ. Send each parameter once."
                    )
            if offset == self._num_digested:
                self._digest.update(arrived, landed[offset:end], streams=True)
                self._num_digested = end
            else:
                landed[offset:end] = arrived
        joined = [(offset, end), *neighbours]
        self._extents[first:last] = [(min(start for start, _ in joined), max(stop for _, stop in joined))]
        return missing > 0 == self.num_missing

    @property
    def num_missing(self) -> int:
        return self.spec.num_bytes - sum(stop - start for start, stop in self._extents)

    def digest(self) -> int:
        """Return the digest of the bytes as they lie in memory."""
        if self._num_digested < self.spec.num_bytes:
            return tensor_digest(self.spec, self.memory)
        return self._digest.value()

    def verify(self, expected: int) -> None:
        """Raise unless all bytes landed and have the digest `expected`."""
        name, num_bytes = self.spec.name, self.spec.num_bytes
        if self.num_missing:
            gap = self._extents[0][1] if self._extents and self._extents[0][0] == 0 else 0
            raise ManifestMismatch(
                f"{name} is incomplete: {num_bytes - self.num_missing} of {num_bytes} bytes landed, none at {gap}. "
                "Push again."
            )
        compare(name, self.digest(), expected)


def compare(name: str, found: int, expected: int) -> None:
    """Raise `DigestMismatch` unless what landed has the digest of what was sent."""
    if found != expected:
        raise DigestMismatch(
            f"{name}: the bytes that landed have digest {found:016x}, those sent {expected:016x}. Push again."
        )


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
