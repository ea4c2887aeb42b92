"""An update on its way in: bytes land beside what serves, and are verified as they lie there."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from torch import Tensor

from rolloutd.errors import DigestMismatch, ManifestMismatch

from .digest import tensor_digest
from .manifest import ITEM_BYTES, TensorSpec, WeightManifest
from .tensors import tensor_from

_NUM_NAMED = 3
"""Tensors that a message names before it counts the rest."""


class StagedUpdate:
    """Collects the tensors of one update beside what serves.

    `check` raises for a spec that the model cannot take; it is asked before memory is reserved. Where there is a
    `take`, a tensor that comes in one piece, in memory that can be written to, is handed to it at once, to be copied to
    where it will serve from; it returns the digest of what it copied. Pieces of tensors land in host memory.
    """

    def __init__(
        self,
        update_id: str,
        check: Callable[[TensorSpec], None],
        take: Callable[[TensorSpec, memoryview], int] | None = None,
    ) -> None:
        self.update_id = update_id
        self._check = check
        self._take = take
        self._landings: dict[str, _Landing] = {}
        self._taken: dict[str, tuple[TensorSpec, int]] = {}
        """Tensors that were handed on, with their digests."""

    def write(self, spec: TensorSpec, offset: int, data: memoryview) -> int | None:
        """Land `data` at byte `offset` of a tensor, in any order; equal bytes may land again.

        Returns the digest of a tensor that comes in one piece. Raises `ManifestMismatch`, and lands nothing, for a spec
        that cannot be taken, a range outside the tensor, and bytes that differ from those that landed there before.
        """
        if offset == 0 and spec.name not in self._landings and self._is_whole(spec, data):
            return self._hand_on(spec, data)
        if spec.name in self._taken:
            raise ManifestMismatch(f"{spec.name} came whole and then in pieces. Send each parameter once.")
        landing = self._landings.get(spec.name)
        if landing is None:
            landing = self._landings[spec.name] = self._reserve(spec)
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
        landing.land(offset, data)
        return None

    def _is_whole(self, spec: TensorSpec, data: memoryview) -> bool:
        if self._take is None or data.readonly or spec.dtype not in ITEM_BYTES:
            return False
        return min(spec.shape, default=0) >= 0 and data.nbytes == spec.num_bytes > 0

    def _hand_on(self, spec: TensorSpec, data: memoryview) -> int:
        assert self._take is not None
        before = self._taken.get(spec.name)
        if before is None:
            self._check(spec)
            self._taken[spec.name] = spec, self._take(spec, data)
        elif before != (spec, tensor_digest(spec, data)):
            raise ManifestMismatch(f"{spec.name} came twice and differs. Send each parameter once.")
        return self._taken[spec.name][1]

    def verify(self, manifest: WeightManifest) -> dict[str, Tensor]:
        """Return the tensors if all of the manifest, and nothing else, landed whole and with its digest.

        The digests are recomputed over the bytes as they lie in staging memory; the tensors are views of it. Those that
        were handed on are not among them.
        """
        arrived = self._landings.keys() | self._taken.keys()
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
        for name, (_, digest) in self._taken.items():
            compare(name, digest, manifest.digests[name])
        return {name: tensor_from(landing.spec, landing.data) for name, landing in self._landings.items()}

    def _reserve(self, spec: TensorSpec) -> _Landing:
        if spec.dtype not in ITEM_BYTES:
            raise ManifestMismatch(f"{spec.name} has dtype {spec.dtype}; use one of {', '.join(ITEM_BYTES)}.")
        if min(spec.shape, default=0) < 0:
            raise ManifestMismatch(f"{spec.name} has shape {list(spec.shape)}; no size may be negative.")
        self._check(spec)
        try:
            return _Landing(spec)
        except (MemoryError, OverflowError):
            raise ManifestMismatch(
                f"{spec.name} {list(spec.shape)} needs {spec.num_bytes} bytes of host memory, which are not to be had. "
                "Free memory on the daemon's host, or send a smaller tensor."
            ) from None


class _Landing:
    """The memory of one tensor, and which parts of it have landed."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.data = bytearray(spec.num_bytes)
        self._extents: list[tuple[int, int]] = []
        """(start, stop) of what landed: sorted, and neither overlapping nor touching."""

    def land(self, offset: int, data: memoryview) -> None:
        if data.nbytes == 0:
            return
        end = offset + data.nbytes
        first = bisect_left(self._extents, offset, key=lambda extent: extent[1])
        last = bisect_right(self._extents, end, key=lambda extent: extent[0])
        neighbours = self._extents[first:last]
        # Released also by an error, whose traceback would otherwise keep the sender's shared memory mapped.
        with memoryview(self.data) as landed, data.cast("B") as arrived:
            for start, stop in neighbours:
                low, high = max(start, offset), min(stop, end)
                if landed[low:high] != arrived[low - offset : high - offset]:
                    raise ManifestMismatch(
                        f"{self.spec.name}: bytes {low} to {high} came twice and differ. Send each parameter once."
                    )
            landed[offset:end] = arrived
        joined = [(offset, end), *neighbours]
        self._extents[first:last] = [(min(start for start, _ in joined), max(stop for _, stop in joined))]

    def verify(self, expected: int) -> None:
        """Raise unless all bytes landed and have the digest `expected`."""
        name, num_bytes = self.spec.name, self.spec.num_bytes
        num_landed = sum(stop - start for start, stop in self._extents)
        if num_landed < num_bytes:
            gap = self._extents[0][1] if self._extents and self._extents[0][0] == 0 else 0
            raise ManifestMismatch(
                f"{name} is incomplete: {num_landed} of {num_bytes} bytes landed, none at {gap}. Push again."
            )
        compare(name, tensor_digest(self.spec, self.data), expected)


def compare(name: str, found: int, expected: int) -> None:
    """Raise `DigestMismatch` unless what landed has the digest of what was sent."""
    if found != expected:
        raise DigestMismatch(
            f"{name}: the bytes that landed have digest {found:016x}, those sent {expected:016x}. Push again."
        )


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
