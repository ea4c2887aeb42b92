"""Tensors as bytes and back, without copies where the tensor lies dense on the CPU."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from rolloutd.errors import ManifestMismatch

from .digest import Digest, block_factors, place_factors, tensor_digest
from .manifest import ITEM_BYTES, TensorSpec

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


def digest_of(spec: TensorSpec, tensor: Tensor) -> int:
    """Return the digest of a tensor's bytes, computed on the device where they lie."""
    if tensor.device.type == "cpu":
        return tensor_digest(spec, bytes_of(tensor))
    return _digest_on_device(spec, tensor)


def _digest_on_device(spec: TensorSpec, tensor: Tensor) -> int:
    """The same sum as `digest.Digest`: int64 wraps as it should."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = F.pad(flat, (0, -len(flat) % 4)).view(torch.int32)
    factors = torch.from_numpy(place_factors().view("int64").copy()).to(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, len(words), _BLOCKS_AT_ONCE * len(factors)):
        part = words[first : first + _BLOCKS_AT_ONCE * len(factors)].to(torch.int64) & 0xFFFFFFFF
        part = F.pad(part, (0, -len(part) % len(factors))).view(-1, len(factors))
        blocks = torch.from_numpy(block_factors(first // len(factors), len(part)).view("int64")).to(tensor.device)
        total += ((part * factors).sum(1) * blocks).sum()
    return Digest.of_sum(spec, int(total), spec.num_bytes)


def tensor_from(spec: TensorSpec, data: bytearray | memoryview) -> Tensor:
    """Return a tensor over `data`, which it keeps alive."""
    if not data:
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    return torch.frombuffer(data, dtype=getattr(torch, spec.dtype)).view(spec.shape)
