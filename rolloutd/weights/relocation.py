"""Weights that change their memory: to another device and back, or into memory that somebody else made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class Relocation:
    """Moves tensors, views with their whole storage: what shared memory before shares it after.

    `copy` takes the bytes of a storage and returns them at their new place, a storage of their own; also where the
    device is the same, so that nothing of the old place is in use any more.
    """

    def __init__(self, copy: Callable[[Tensor], Tensor]) -> None:
        self._copy = copy
        self._moved: dict[int, Tensor] = {}
        """Address of a storage -> its bytes at the new place."""
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        """Tensors by identity, the old one kept so that nothing else gets its number: one object stays one object."""

    @classmethod
    def to(cls, device: torch.device) -> Relocation:
        """Return one to new memory of a device."""
        return cls(lambda whole: whole.to(device, copy=True))

    @classmethod
    def into(cls, places: Mapping[int, Tensor]) -> Relocation:
        """Return one to given memory: for the address of a storage as many bytes. Others stay where they are."""
        return cls(lambda whole: places[whole.data_ptr()].copy_(whole) if whole.data_ptr() in places else whole)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor at its new place, with the same strides."""
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = tensor, self._move(tensor)
        return self._seen[id(tensor)][1]

    def _move(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._moved:
            self._moved[address] = self._copy(bytes_of_storage(tensor))
        moved = self._moved[address].untyped_storage()
        new = torch.empty(0, dtype=tensor.dtype, device=moved.device)
        return new.set_(moved, tensor.storage_offset(), tensor.shape, tensor.stride())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What memory weights would need elsewhere, and where in it parameters would lie."""

    sizes: list[int]
    """Bytes of each storage."""
    places: list[tuple[int, int]]
    """Of each parameter: which storage, and from which element of it on."""


class Inventory:
    """Takes part as a relocation that moves nothing, and notes the storages that it is shown."""

    def __init__(self) -> None:
        self.storages: dict[int, Tensor] = {}
        """Address -> bytes, in the order in which they were seen."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        whole = bytes_of_storage(tensor)
        self.storages.setdefault(whole.data_ptr(), whole)
        return tensor

    def sizes(self) -> list[int]:
        """Return the bytes of each."""
        return [whole.nbytes for whole in self.storages.values()]

    def index_of(self, tensor: Tensor) -> int:
        """Return which of the storages a tensor lies in."""
        return list(self.storages).index(tensor.untyped_storage().data_ptr())


def bytes_of_storage(tensor: Tensor) -> Tensor:
    """Return all bytes of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
