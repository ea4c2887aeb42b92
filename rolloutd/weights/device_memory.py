"""GPU memory that two processes of one host share, for weights that stay on the GPU on their way (CUDA IPC).

The handle is numbers and bytes; nothing is pickled. One process makes a segment and fills it; the other one maps it for
as long as an update lasts. What is enqueued on a GPU is not done yet: each side calls `settle` before it tells the
other one that a part is filled, or read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rolloutd.errors import ManifestMismatch, first_line

_MAX_HANDLE_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class DeviceHandle:
    """Where a segment lies, for another process."""

    gpu: str
    """UUID: processes may count GPUs differently."""
    num_bytes: int
    allocation: bytes
    """The driver's name of the allocation that it is part of."""
    offset: int
    """Of the segment in it, in bytes."""


def is_shareable(device: torch.device) -> bool:
    """Return whether memory of such a device can be shared as a segment."""
    return device.type == "cuda"


class DeviceSegment:
    """Bytes on a GPU. A context manager: leaving it lets go of them.

    The maker's memory is its own again from then on, whatever the other side does: digests tell if it still read.
    """

    def __init__(self, buffer: Tensor, handle: DeviceHandle, release: Callable[[], None] = lambda: None) -> None:
        self.handle = handle
        self.num_bytes = handle.num_bytes
        self._buffer: Tensor | None = buffer
        self._release = release

    @classmethod
    def create(cls, num_bytes: int, device: torch.device) -> DeviceSegment:
        """Return new memory; `RuntimeError`, of which `torch.OutOfMemoryError` is a kind, where it is not to be had."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return cls(buffer, *_shared(buffer))

    @classmethod
    def attach(cls, handle: DeviceHandle, own_device: str, *, peers: bool) -> DeviceSegment:
        """Return memory that another process of this host made; `ManifestMismatch` where it cannot be mapped.

        It must lie on the process's own GPU, or with `peers` on any that it sees.
        """
        own = torch.device(own_device)
        if handle.num_bytes <= 0 or handle.offset < 0 or not 0 < len(handle.allocation) <= _MAX_HANDLE_BYTES:
            raise ManifestMismatch("a handle of GPU memory that no rolloutd client makes. Use rolloutd's own client.")
        device = next((device for device in _candidates(own, peers=peers) if gpu_of(device) == handle.gpu), None)
        if device is None:
            raise ManifestMismatch(
                f"the weights lie on GPU {handle.gpu}, and the daemon computes on {gpu_of(own)}. Use "
                "transport='shared_memory', or make both GPUs visible to the daemon and ask for transport='cuda_ipc'."
            )
        try:
            return cls(_mapped(handle, device), handle)
        except RuntimeError as error:
            reason = first_line(error)
        raise ManifestMismatch(
            f"GPU memory of the trainer cannot be mapped ({reason}). Use transport='shared_memory'; containers must "
            "have their IPC and process namespaces in common to share a GPU's memory."
        )

    @property
    def buffer(self) -> Tensor:
        """The bytes, [num_bytes], uint8."""
        assert self._buffer is not None, "the segment is open"
        return self._buffer

    def settle(self) -> None:
        """Wait for everything that was enqueued here."""
        if self.buffer.is_cuda:
            torch.cuda.current_stream(self.buffer.device).synchronize()

    def close(self) -> None:
        """Let go of the memory."""
        if self._buffer is not None:
            self._release()  # before it is freed: torch looks at the counter then
            self._buffer = None

    def __enter__(self) -> DeviceSegment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def gpu_of(device: torch.device) -> str:
    """Return the UUID of a GPU; the name of a device that is none."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else str(device)


def _candidates(own: torch.device, *, peers: bool) -> list[torch.device]:
    if not is_shareable(own):
        return []
    others = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if peers else []
    return [own, *others]


def _shared(buffer: Tensor) -> tuple[DeviceHandle, Callable[[], None]]:
    """Offer a tensor to other processes; return how, and what takes the offer back.

    torch keeps the memory of a tensor that was offered until a counter is back at zero, which the other side is to
    lower. Ours does not: it may be killed, or never come. The maker does, when the update is over.
    """
    shared: tuple[Any, ...] = buffer.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    _, allocation, num_bytes, offset, counter, counter_offset, _, _ = shared

    def release() -> None:
        torch.UntypedStorage._release_ipc_counter_cuda(counter, counter_offset)

    return DeviceHandle(gpu_of(buffer.device), num_bytes, allocation, offset), release


_NO_COUNTER = b"/rolloutd-none", 0
"""torch looks for it when the tensor is freed, and goes on where there is none."""
_NO_EVENT = b"", False
"""The maker has waited before it said that a part is filled."""


def _mapped(handle: DeviceHandle, device: torch.device) -> Tensor:
    """Return the tensor that another process offers."""
    index = torch.cuda.current_device() if device.index is None else device.index
    where = handle.allocation, handle.num_bytes, handle.offset
    storage = torch.UntypedStorage._new_shared_cuda(index, *where, *_NO_COUNTER, *_NO_EVENT)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
