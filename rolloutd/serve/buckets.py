"""Pieces of tensors that travel to the daemon together: as frames, in shared memory, over a channel, or on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rolloutd.weights.cores import SHARED_CORES
from rolloutd.weights.delta import Encoding
from rolloutd.weights.device_memory import DeviceSegment
from rolloutd.weights.digest import Digest
from rolloutd.weights.manifest import TensorSpec
from rolloutd.weights.shared_memory import Segment
from rolloutd.weights.tensors import Bytes, bytes_of, digest_on_device, flat_bytes

from . import protocol as wire
from .steps import PARTS, device_memory

if TYPE_CHECKING:
    from rolloutd.weights.collective import Channel

ALIGNMENT = 16
"""Of tensors on a GPU, in bytes."""


class Digesting(Protocol):
    """Takes the bytes of one tensor in order, and copies them in the same pass if it is told where to."""

    def update(self, data: Any, into: Any = None) -> None:
        """Take the next bytes."""
        ...

    def value(self) -> int:
        """Return the digest of all of them."""
        ...


class Bucket(ABC):
    """Filled piece by piece, sent, and filled again."""

    def __init__(self, update_id: str, capacity: int) -> None:
        self.items: list[wire.StageItem] = []
        self.capacity = capacity
        """Bytes that it takes."""
        self.num_bytes = 0
        """Taken since the beginning of the update."""
        self._update_id = update_id
        self._used = 0

    @property
    def num_free(self) -> int:
        """Bytes that it still takes."""
        return self.capacity - self._used

    @property
    def is_full(self) -> bool:
        return self._used >= self.capacity

    def opened(self, spec: TensorSpec, tensor: Tensor) -> tuple[Bytes, Digesting]:
        """Return a tensor's bytes as this bucket takes them, and what digests them as they are taken."""
        return bytes_of(tensor), Digest(spec, SHARED_CORES)

    def add(self, spec: TensorSpec, offset: int, data: Bytes, digest: Digesting) -> int:
        """Take the beginning of `data`, as much as fits, into the digest too, and return how many bytes that is."""
        part = data[: self.num_free]
        self._put(part, digest)
        self._note(spec, offset, part.nbytes)
        return part.nbytes

    def add_delta(self, spec: TensorSpec, offset: int, covered: int, encoding: Encoding, data: bytearray) -> None:
        """Take a delta for `covered` bytes of a tensor; it fits into what is free."""
        self._put(memoryview(data), None)
        self._note(spec, offset, len(data), encoding, covered)

    @abstractmethod
    def _put(self, data: Bytes, digest: Digesting | None) -> None:
        """Copy bytes to where they travel from, and digest them on the way."""

    def _at(self) -> int:
        """Return where the next piece begins for the daemon."""
        return self._used

    def _note(
        self, spec: TensorSpec, offset: int, num_bytes: int, encoding: Encoding | None = None, covered: int = 0
    ) -> None:
        self.items.append(
            wire.StageItem(
                name=spec.name,
                dtype=spec.dtype,
                shape=list(spec.shape),
                offset=offset,
                num_bytes=num_bytes,
                at=self._at(),
                encoding=encoding,
                covered=covered,
            )
        )
        self._used += num_bytes
        self.num_bytes += num_bytes

    @property
    def must_be_tried(self) -> bool:
        """Whether the daemon may be unable to read what it is filled with; a message without items shows it."""
        return False

    @abstractmethod
    def message(self) -> tuple[wire.WeightsStage, list[wire.Frame]]:
        """Return what to send."""

    def sent(self) -> None:  # noqa: B027  (nothing follows, but for one kind)
        """Do what follows on the message."""

    def clear(self) -> None:
        """Begin anew."""
        self.items, self._used = [], 0


class InlineBucket(Bucket):
    """Frames of the message."""

    def __init__(self, update_id: str, capacity: int) -> None:
        super().__init__(update_id, capacity)
        self._frames: list[wire.Frame] = []

    @property
    def is_full(self) -> bool:
        return super().is_full or len(self.items) >= wire.MAX_FRAMES

    def _put(self, data: Bytes, digest: Digesting | None) -> None:
        if digest is not None:
            digest.update(data)
        self._frames.append(bytes(data))

    def message(self) -> tuple[wire.WeightsStage, list[wire.Frame]]:
        return wire.WeightsStage(update_id=self._update_id, items=self.items), self._frames

    def clear(self) -> None:
        super().clear()
        self._frames = []


class _SentBucket(Bucket):
    """Memory whose content follows the message over a channel."""

    _memory: Any
    """That can be cut by bytes: of the host, or of a GPU."""

    def __init__(self, update_id: str, capacity: int, channel: Channel) -> None:
        super().__init__(update_id, capacity)
        self._channel = channel

    def message(self) -> tuple[wire.WeightsStage, list[wire.Frame]]:
        frames: list[wire.Frame] = [] if self._used else [b""] * len(self.items)
        return wire.WeightsStage(update_id=self._update_id, items=self.items, channel_bytes=self._used), frames

    def sent(self) -> None:
        """Send what was filled, if it is anything; its memory may be filled again then."""
        if self._used:
            self._channel.send(self._memory[: self._used])


class SentBucket(_SentBucket):
    """Memory of the host, sent over a channel."""

    def __init__(self, update_id: str, capacity: int, channel: Channel) -> None:
        super().__init__(update_id, capacity, channel)
        self._memory = memoryview(bytearray(capacity))

    def _put(self, data: Bytes, digest: Digesting | None) -> None:
        _copy(data, self._memory[self._used : self._used + data.nbytes], digest)


class _PartedBucket(Bucket):
    """One part after the other of memory that the daemon reads too."""

    def __init__(self, update_id: str, segment: Segment | DeviceSegment) -> None:
        super().__init__(update_id, segment.num_bytes // PARTS)
        self._begin = 0

    must_be_tried = True

    def _at(self) -> int:
        return self._begin + self._used

    def clear(self) -> None:
        super().clear()
        self._begin = (self._begin + self.capacity) % (PARTS * self.capacity)


class SharedBucket(_PartedBucket):
    """Memory that both processes have mapped."""

    def __init__(self, update_id: str, segment: Segment) -> None:
        super().__init__(update_id, segment)
        self._segment = segment

    def _put(self, data: Bytes, digest: Digesting | None) -> None:
        _copy(data, self._segment.buffer[self._at() : self._at() + data.nbytes], digest)

    def message(self) -> tuple[wire.WeightsStage, list[wire.Frame]]:
        name, num_bytes = self._segment.name, self._segment.num_bytes
        return wire.WeightsStage(update_id=self._update_id, items=self.items, segment=name, segment_bytes=num_bytes), []


class _OnDevice(Bucket):
    """Memory of a GPU; what comes from elsewhere is copied there."""

    @abstractmethod
    def _buffer(self) -> Tensor:
        """Return the memory, bytes."""

    def opened(self, spec: TensorSpec, tensor: Tensor) -> tuple[Bytes, Digesting]:
        data = flat_bytes(tensor.to(self._buffer().device))
        return data, _DigestOnDevice(spec, data)

    def _put(self, data: Bytes, digest: Digesting | None) -> None:
        assert digest is not None, "deltas are made in host memory"
        digest.update(data, self._buffer()[self._at() : self._at() + data.nbytes])

    def _note(
        self, spec: TensorSpec, offset: int, num_bytes: int, encoding: Encoding | None = None, covered: int = 0
    ) -> None:
        super()._note(spec, offset, num_bytes, encoding, covered)
        self._used += -self._used % ALIGNMENT


class SentDeviceBucket(_OnDevice, _SentBucket):
    """Memory of a GPU, sent over a channel."""

    def __init__(self, update_id: str, capacity: int, channel: Channel) -> None:
        super().__init__(update_id, capacity, channel)
        self._memory = torch.empty(capacity, dtype=torch.uint8, device=channel.device)

    def _buffer(self) -> Tensor:
        memory: Tensor = self._memory
        return memory


class DeviceBucket(_OnDevice, _PartedBucket):
    """One part after the other of a GPU's memory that the daemon reads too."""

    def __init__(self, update_id: str, segment: DeviceSegment, *, peers: bool) -> None:
        super().__init__(update_id, segment)
        self._segment = segment
        self._handle = device_memory(segment.handle, peers=peers)

    def _buffer(self) -> Tensor:
        return self._segment.buffer

    def message(self) -> tuple[wire.WeightsStage, list[wire.Frame]]:
        self._segment.settle()
        return wire.WeightsStage(update_id=self._update_id, items=self.items, device=self._handle), []


class _DigestOnDevice:
    """The digest of a whole tensor, computed on the GPU where it lies."""

    def __init__(self, spec: TensorSpec, data: Tensor) -> None:
        self._result = digest_on_device(spec, data)

    def update(self, data: Any, into: Any = None) -> None:
        """Copy bytes; they are digested as a whole."""
        into.copy_(data)

    def value(self) -> int:
        """Wait for the digest."""
        return self._result()


def _copy(data: Bytes, into: memoryview, digest: Digesting | None) -> None:
    if digest is None:
        into[:] = data  # type: ignore[assignment]  # a memoryview, as `opened` returned it
    else:
        digest.update(data, into)
