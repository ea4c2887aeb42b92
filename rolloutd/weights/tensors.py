"""Tensors as bytes and back, without copies where the tensor lies dense."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rolloutd.errors import ManifestMismatch

from .digest import Digest, block_factors, place_factors, tensor_digest
from .manifest import ITEM_BYTES, TensorSpec

Bytes: TypeAlias = "memoryview | Tensor"
"""Of one tensor, dense in row order; where they lie on a GPU, as a flat tensor of uint8."""

_BLOCKS_AT_ONCE = 1 << 11
"""Blocks of the digest that a device sums at a time: 16 MiB of data, four times that in 64 bits."""


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """Return name, dtype and shape; `ManifestMismatch` for a dtype that weights cannot have."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise ManifestMismatch(f"{name} has dtype {dtype}; weights travel as {', '.join(ITEM_BYTES)}. Cast it first.")
    return TensorSpec(name, dtype, tuple(tensor.shape))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the tensor's bytes, dense in row order; a view of its memory where that is dense and on the CPU.

    Not by way of numpy, which forbids torch to free the memory as FSDP does it: by resizing the storage.
    """
    dense = tensor.detach().cpu().contiguous()
    if not dense.nbytes:
        return memoryview(bytearray())
    memory = (ctypes.c_ubyte * dense.nbytes).from_address(dense.data_ptr())
    memory.tensor = dense  # type: ignore[attr-defined]  # lives as long as the view
    return memoryview(memory).cast("B")


def flat_bytes(tensor: Tensor) -> Tensor:
    """Return the tensor's bytes, dense in row order, on its own device: a view of its memory where that is dense."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def bytes_as_they_lie(tensor: Tensor) -> Bytes:
    """Return the tensor's bytes, dense in row order, where they lie if that is the host's memory or a GPU's."""
    return flat_bytes(tensor) if tensor.is_cuda else bytes_of(tensor)


def digest_of(spec: TensorSpec, tensor: Tensor) -> int:
    """Return the digest of a tensor's bytes, computed on the device where they lie."""
    if tensor.device.type == "cpu":
        return tensor_digest(spec, bytes_of(tensor))
    return digest_on_device(spec, flat_bytes(tensor))()


def digest_on_device(spec: TensorSpec, data: Tensor) -> Callable[[], int]:
    """Begin to digest flat bytes where they lie; what is returned waits for the result.

    The same sum as `digest.Digest`: int64 wraps as it should.
    """
    if data.data_ptr() % 4:
        data = data.clone()  # words begin at multiples of their size
    words = F.pad(data, (0, -len(data) % 4)).view(torch.int32)
    factors = _place_factors(data.device)
    per_block = len(factors)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for first in range(0, len(words), _BLOCKS_AT_ONCE * per_block):
        part = words[first : first + _BLOCKS_AT_ONCE * per_block].to(torch.int64) & 0xFFFFFFFF
        part = F.pad(part, (0, -len(part) % per_block)).view(-1, per_block)
        blocks = _block_factors(data.device, first // per_block)[: len(part)]
        total += ((part * factors).sum(1) * blocks).sum()
    return lambda: Digest.of_sum(spec, int(total), spec.num_bytes)


@cache
def _place_factors(device: torch.device) -> Tensor:
    return torch.from_numpy(place_factors().view("int64").copy()).to(device)


@cache
def _block_factors(device: torch.device, first: int) -> Tensor:
    """Return the factors of as many blocks as are summed at a time."""
    return torch.from_numpy(block_factors(first, _BLOCKS_AT_ONCE).view("int64")).to(device)


def tensor_from(spec: TensorSpec, data: Bytes | bytearray) -> Tensor:
    """Return a tensor over `data`, which it keeps alive; over a copy where its elements would lie askew."""
    if isinstance(data, Tensor):
        whole = data if data.data_ptr() % ITEM_BYTES[spec.dtype] == 0 else data.clone()
        return whole.view(getattr(torch, spec.dtype)).view(spec.shape)
    if not data:
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    return torch.frombuffer(data, dtype=getattr(torch, spec.dtype)).view(spec.shape)
