"""Weights that leave a device and come back."""

from __future__ import annotations

import torch
from torch import Tensor


class Relocation:
    """Moves tensors to a device, views with their whole storage: what shared memory before shares it after.

    Bytes are copied also where the device is the same, so that nothing of the old place is in use any more.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moved: dict[int, Tensor] = {}
        """Address of a storage -> its bytes at the new place."""
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        """Tensors by identity, the old one kept so that nothing else gets its number: one object stays one object."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor at its new place, with the same strides."""
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = tensor, self._move(tensor)
        return self._seen[id(tensor)][1]

    def _move(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        moved = self._moved.get(storage.data_ptr())
        if moved is None:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            moved = self._moved[storage.data_ptr()] = whole.to(self._device, copy=True)
        new = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return new.set_(moved.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
