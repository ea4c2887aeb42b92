"""Copies between host and device that nobody waits for, and a wait that has a deadline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rolloutd.errors import EngineStalled

POLL_S = 50e-6
"""Between two looks at an event: little beside a run of several milliseconds, and the core is free for others."""


class Event(Protocol):
    """Something that will have happened."""

    def query(self) -> bool:
        """Return whether it has."""
        ...


def wait(event: Event, deadline_s: float, what: str) -> None:
    """Return once `event` has happened; `EngineStalled` after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not event.query():
        if time.monotonic() > end:
            raise EngineStalled(f"{what} did not end within {deadline_s:g} s: the device hangs. Restart the engine.")
        time.sleep(POLL_S)


class Transfers(Protocol):
    """How a device gets and gives bytes."""

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return zeroed host memory that `fetch` and asynchronous copies may use."""
        ...

    def fetch(self, source: Tensor, target: Tensor) -> Event:
        """Copy device memory as it will be after what was launched so far; the event says that it is there."""
        ...


class _Happened:
    def query(self) -> bool:
        return True


class CpuTransfers:
    """Where the device is the host: copies are done when the call returns."""

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return zeroed memory."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def fetch(self, source: Tensor, target: Tensor) -> Event:
        """Copy."""
        target.copy_(source)
        return _Happened()


class CudaTransfers:
    """Pinned memory, and a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return zeroed pinned memory."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def fetch(self, source: Tensor, target: Tensor) -> Event:
        """Copy on the side stream, after what the current stream was given."""
        self._side.wait_stream(torch.cuda.current_stream(source.device))
        event = torch.cuda.Event()
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            event.record(self._side)
        return event


def transfers_for(device: torch.device) -> Transfers:
    """Return the kind that suits a device."""
    return CudaTransfers(device) if device.type == "cuda" else CpuTransfers()
