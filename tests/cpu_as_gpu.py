"""A CPU in a GPU's place, for the way that weights go in a GPU's memory: real memory, which two processes really share.

Only the two calls of the driver are replaced, those that offer and map an allocation, and the making of a group of
NCCL, by one of gloo; messages, landing, digests and fallbacks are those of a GPU. `FACTORY` makes a real engine whose
process does likewise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from rolloutd.config import EngineConfig
from rolloutd.engine.engine import Engine
from rolloutd.weights import collective, device_memory, shared_base
from rolloutd.weights.device_memory import DeviceHandle

FACTORY = "tests.cpu_as_gpu:engine"


class Patch(Protocol):
    """What replaces attributes, such as pytest's monkeypatch."""

    def setattr(self, target: Any, name: str, value: Any) -> None: ...


class Forever:
    """Replaces attributes until the process ends."""

    def setattr(self, target: Any, name: str, value: Any) -> None:
        setattr(target, name, value)


def cpu_as_gpu(patch: Patch) -> None:
    """Let memory of this process's CPU be shared as a GPU's is."""
    from rolloutd.serve import push_steps  # needs the packages of sockets, which not all tests that call this do

    for module in (device_memory, push_steps, shared_base):
        patch.setattr(module, "is_shareable", lambda device: True)
    patch.setattr(device_memory, "_shared", shared)
    patch.setattr(device_memory, "_mapped", lambda handle, device: mapped(handle))
    patch.setattr(push_steps, "DEVICE_BYTES", 1 << 20)
    gloo_as_nccl(patch)


def gloo_as_nccl(patch: Patch) -> None:
    """Let this process's groups of NCCL be gloo's."""

    def group(store: Any, rank: int, timeout: timedelta) -> Any:
        return collective._gloo(store, rank, timeout, "127.0.0.1")

    patch.setattr(collective, "_nccl", group)
    patch.setattr(collective, "check_available", lambda backend: None)


def shared(buffer: Tensor) -> tuple[DeviceHandle, Callable[[], None]]:
    """Move a tensor to memory that others can map, under a name that ends with the process."""
    descriptor, num_bytes = buffer.untyped_storage()._share_fd_cpu_()
    return DeviceHandle("cpu", num_bytes, f"/proc/{os.getpid()}/fd/{descriptor}".encode(), 0), lambda: None


def mapped(handle: DeviceHandle) -> Tensor:
    """Map it."""
    return torch.from_file(handle.allocation.decode(), shared=True, size=handle.num_bytes, dtype=torch.uint8)


def engine(config: EngineConfig) -> Engine:
    """Return a real engine that maps memory so."""
    cpu_as_gpu(Forever())
    return Engine.from_config(config)


def engine_that_fails(config: EngineConfig) -> Engine:
    """Return one whose driver has a bug."""

    def broken(handle: DeviceHandle, device: torch.device) -> Tensor:
        raise AttributeError("no such function in this version")

    made = engine(config)
    device_memory._mapped = broken
    return made
