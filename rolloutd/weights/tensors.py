"""Tensors as bytes and back, without copies where the tensor lies dense on the CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rolloutd.errors import ManifestMismatch

from .manifest import ITEM_BYTES, TensorSpec


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


def tensor_from(spec: TensorSpec, data: bytearray | memoryview) -> Tensor:
    """Return a tensor over `data`, which it keeps alive."""
    if not data:
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    return torch.frombuffer(data, dtype=getattr(torch, spec.dtype)).view(spec.shape)
