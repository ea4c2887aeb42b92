"""Memory: a named error where a device's ends, and large pages on a CPU."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rolloutd.errors import OutOfMemory


def release(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device, where another process may want it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(what: str, error: torch.OutOfMemoryError, device: torch.device) -> OutOfMemory:
    """Return the named error. Raise it after the `except` block: the frames that `error` names hold their tensors."""
    reason = str(error).partition(". ")[0].partition("\n")[0]
    error.__traceback__ = None
    release(device)
    return OutOfMemory(
        f"no memory for {what} ({reason}). Lower --gpu-memory-utilization, --max-num-batched-tokens or --max-num-seqs, "
        "or free memory on the device."
    )


_LARGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


def in_large_pages(tensor: Tensor) -> Tensor:
    """Ask Linux for pages of 2 MiB where a CPU tensor that nobody wrote to yet will lie, and return it.

    What reads a model's weights in every step goes through more 4 KiB pages than a core keeps translations of.
    """
    advise = _madvise()
    if advise is not None and tensor.device.type == "cpu" and tensor.nbytes >= _LARGE_PAGE:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(begin, end - begin, _MADV_HUGEPAGE)  # advice: a system that does not take it goes on as before
    return tensor


@cache
def _madvise() -> Any | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
