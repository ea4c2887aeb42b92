"""An update on its way in: bytes land beside what serves, and are verified as they lie there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rolloutd.errors import DigestMismatch, ManifestMismatch

from .digest import Digest, tensor_digest
from .manifest import ITEM_BYTES, TensorSpec, WeightManifest
from .tensors import Bytes, bytes_of, digest_on_device, tensor_from

_NUM_NAMED = 3
"""Tensors that a message names before it counts the rest."""


class Place(Protocol):
    """Where a version is put together while its tensors come."""

    def of(self, spec: TensorSpec, data: Bytes) -> Bytes | None:
        """Return the memory that a tensor will serve from, where that is of the kind that `data` is of.

        None where the tensor is cast or moved on its way there.
        """
        ...

    def filled(self, spec: TensorSpec) -> None:
        """Take note that all bytes of that memory have landed."""
        ...

    def add(self, spec: TensorSpec, data: Bytes) -> None:
        """Cast or move a whole tensor to where it will serve from."""
        ...


class StagedUpdate:
    """Collects the tensors of one update beside what serves.

    `check` raises for a spec that the model cannot take; it is asked before memory is reserved. With a `place` tensors
    land where they will serve from, as far as they can; else they lie in host memory until `verify`. Bytes that come on
    a GPU stay on it, if there is a place at all.
    """

    def __init__(self, update_id: str, check: Callable[[TensorSpec], None], place: Place | None = None) -> None:
        self.update_id = update_id
        self._check = check
        self._place = place
        self._landings: dict[str, _Landing] = {}
        self._added: dict[str, tuple[TensorSpec, Callable[[], int]]] = {}
        """Tensors that came whole and were cast or moved, with their digests."""

    def write(self, spec: TensorSpec, offset: int, data: Bytes) -> Callable[[], int] | None:
        """Land `data` at byte `offset` of a tensor, in any order; equal bytes may land again.

        Returns what gives the digest of a tensor that came in one piece. Raises `ManifestMismatch`, and lands nothing,
        for a spec that cannot be taken, a range outside the tensor, and bytes that differ from those that landed there
        before.
        """
        if spec.name in self._added:
            return self._add_again(spec, data)
        landing = self._landings.get(spec.name)
        if landing is None:
            memory = self._reserve(spec, data)
            is_whole = offset == 0 and data.nbytes == spec.num_bytes > 0
            if self._place is not None and memory is None and is_whole and _may_be_kept(data):
                digest = _digested(spec, data)
                self._place.add(spec, data)
                self._added[spec.name] = spec, digest
                return digest
            landing = self._landings[spec.name] = self._landing(spec, memory, data)
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
        return landing.digest if data.nbytes == spec.num_bytes else None

    def specs(self) -> tuple[TensorSpec, ...]:
        """Return every tensor that landed."""
        return (*(landing.spec for landing in self._landings.values()), *(spec for spec, _ in self._added.values()))

    def _add_again(self, spec: TensorSpec, data: Bytes) -> Callable[[], int]:
        before, digest = self._added[spec.name]
        if before != spec or data.nbytes != spec.num_bytes or _digested(spec, data)() != digest():
            raise ManifestMismatch(f"{spec.name} came twice and differs. Send each parameter once.")
        return digest

    def verify(self, manifest: WeightManifest) -> dict[str, Tensor]:
        """Return the tensors if all of the manifest, and nothing else, landed whole and with its digest.

        The digests are those of the bytes as they lie where they landed; the tensors are views of that memory. What is
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
            compare(name, digest(), manifest.digests[name])
        return {name: landing.tensor() for name, landing in self._landings.items() if not landing.is_in_place}

    def _reserve(self, spec: TensorSpec, data: Bytes) -> Bytes | None:
        """Check a tensor that is new, and return its place if it has one that its bytes can land in."""
        if spec.dtype not in ITEM_BYTES:
            raise ManifestMismatch(f"{spec.name} has dtype {spec.dtype}; use one of {', '.join(ITEM_BYTES)}.")
        if min(spec.shape, default=0) < 0:
            raise ManifestMismatch(f"{spec.name} has shape {list(spec.shape)}; no size may be negative.")
        self._check(spec)
        return None if self._place is None else self._place.of(spec, data)

    def _landing(self, spec: TensorSpec, memory: Bytes | None, data: Bytes) -> _Landing:
        """Return where a tensor lands: at its place if it has one, else in memory that is reserved for it."""
        in_place = memory is not None
        if memory is None and isinstance(data, Tensor) and self._place is not None:
            memory = torch.empty(spec.num_bytes, dtype=torch.uint8, device=data.device)
        if isinstance(memory, Tensor):
            return _DeviceLanding(spec, memory, is_in_place=in_place)
        return _HostLanding(spec, _host_memory(spec) if memory is None else memory, is_in_place=in_place)


def _may_be_kept(data: Bytes) -> bool:
    """Whether a tensor may be made of these bytes as they are."""
    return isinstance(data, Tensor) or not data.readonly


def _digested(spec: TensorSpec, data: Bytes) -> Callable[[], int]:
    """Digest a whole tensor where it lies; what is returned gives the result."""
    if isinstance(data, Tensor):
        return digest_on_device(spec, data)
    digest = tensor_digest(spec, data)
    return lambda: digest


def _host_memory(spec: TensorSpec) -> bytearray:
    try:
        return bytearray(spec.num_bytes)
    except (MemoryError, OverflowError):
        raise ManifestMismatch(
            f"{spec.name} {list(spec.shape)} needs {spec.num_bytes} bytes of host memory, which are not to be had. "
            "Free memory on the daemon's host, or send a smaller tensor."
        ) from None


class _Landing(ABC):
    """The memory of one tensor, and which parts of it have landed."""

    def __init__(self, spec: TensorSpec, *, is_in_place: bool) -> None:
        self.spec = spec
        self.is_in_place = is_in_place
        """It will serve from there."""
        self._extents: list[tuple[int, int]] = []
        """(start, stop) of what landed: sorted, and neither overlapping nor touching."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """Return the tensor that landed."""

    @abstractmethod
    def digest(self) -> int:
        """Return the digest of the bytes as they lie in memory, once all have landed."""

    @abstractmethod
    def _put(self, offset: int, data: Bytes, overlaps: list[tuple[int, int]]) -> None:
        """Copy bytes to byte `offset`; `ManifestMismatch` where they differ from what landed at `overlaps` before."""

    def land(self, offset: int, data: Bytes) -> bool:
        """Land bytes; return whether these were the last that were missing."""
        if data.nbytes == 0:
            return False
        end = offset + data.nbytes
        first = bisect_left(self._extents, offset, key=lambda extent: extent[1])
        last = bisect_right(self._extents, end, key=lambda extent: extent[0])
        neighbours = self._extents[first:last]
        missing = self.num_missing
        self._put(offset, data, [(max(start, offset), min(stop, end)) for start, stop in neighbours])
        joined = [(offset, end), *neighbours]
        self._extents[first:last] = [(min(start for start, _ in joined), max(stop for _, stop in joined))]
        return missing > 0 == self.num_missing

    @property
    def num_missing(self) -> int:
        return self.spec.num_bytes - sum(stop - start for start, stop in self._extents)

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

    def _differ(self, low: int, high: int) -> ManifestMismatch:
        return ManifestMismatch(
            f"{self.spec.name}: bytes {low} to {high} came twice and differ. Send each parameter once."
        )


class _HostLanding(_Landing):
    """Bytes in host memory, digested in the pass that copies them where they come in order."""

    def __init__(self, spec: TensorSpec, memory: memoryview | bytearray, *, is_in_place: bool) -> None:
        super().__init__(spec, is_in_place=is_in_place)
        self._memory = memory
        self._digest = Digest(spec)
        self._num_digested = 0

    def tensor(self) -> Tensor:
        return tensor_from(self.spec, self._memory)

    def digest(self) -> int:
        if self._num_digested < self.spec.num_bytes:
            return tensor_digest(self.spec, self._memory)
        return self._digest.value()

    def _put(self, offset: int, data: Bytes, overlaps: list[tuple[int, int]]) -> None:
        data = bytes_of(data) if isinstance(data, Tensor) else data
        end = offset + data.nbytes
        # Released also by an error, whose traceback would otherwise keep the sender's shared memory mapped.
        with memoryview(self._memory) as landed, data.cast("B") as arrived:
            for low, high in overlaps:
                if landed[low:high] != arrived[low - offset : high - offset]:
                    raise self._differ(low, high)
            if offset == self._num_digested:
                self._digest.update(arrived, landed[offset:end], streams=True)
                self._num_digested = end
            else:
                landed[offset:end] = arrived


class _DeviceLanding(_Landing):
    """Bytes in a GPU's memory, digested there once all have landed."""

    def __init__(self, spec: TensorSpec, memory: Tensor, *, is_in_place: bool) -> None:
        super().__init__(spec, is_in_place=is_in_place)
        self._memory = memory
        self._result: Callable[[], int] | None = None

    def tensor(self) -> Tensor:
        return tensor_from(self.spec, self._memory)

    def land(self, offset: int, data: Bytes) -> bool:
        is_whole = super().land(offset, data)
        if is_whole:  # begun now, so that the commit need not wait for it
            self._result = digest_on_device(self.spec, self._memory)
        return is_whole

    def digest(self) -> int:
        return (self._result or digest_on_device(self.spec, self._memory))()

    def _put(self, offset: int, data: Bytes, overlaps: list[tuple[int, int]]) -> None:
        if not isinstance(data, Tensor):
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        arrived = data.to(self._memory.device)
        for low, high in overlaps:
            if not torch.equal(self._memory[low:high], arrived[low - offset : high - offset]):
                raise self._differ(low, high)
        self._memory[offset : offset + len(arrived)].copy_(arrived)


def compare(name: str, found: int, expected: int) -> None:
    """Raise `DigestMismatch` unless what landed has the digest of what was sent."""
    if found != expected:
        raise DigestMismatch(
            f"{name}: the bytes that landed have digest {found:016x}, those sent {expected:016x}. Push again."
        )


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
