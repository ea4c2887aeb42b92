"""Device memory: a named error where it ends."""

from __future__ import annotations

import torch

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
