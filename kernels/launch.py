"""What every op of this folder checks before a launch. Imports without triton: the references need only torch."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import torch
from torch import Tensor

IS_INSTALLED = find_spec("triton") is not None


def _wants_triton() -> bool:
    """Return whether kernels are defined: triton is installed, and something can run them or has loaded it already.

    A daemon on a CPU does without: triton takes a fifth of a second to load, and writes pages about leaks at the exit.
    """
    if not IS_INSTALLED:
        return False
    return "triton" in sys.modules or os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()


HAS_TRITON = _wants_triton()
"""False where nothing can run kernels; they do not exist there, references do."""


def check(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_launchable(op: str, *tensors: Tensor) -> None:
    """Raise unless `op` can run as a kernel on these tensors: triton is there, and all lie on one CUDA device.

    Under TRITON_INTERPRET=1 CPU tensors are taken instead.
    """
    if not IS_INSTALLED:
        raise RuntimeError(f"{op} needs triton, which is not installed. Install it, or call {op}_reference.")
    devices = {tensor.device for tensor in tensors}
    check(len(devices) == 1, f"{op}: tensors lie on {', '.join(sorted(map(str, devices)))}; put them on one device.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if tensors[0].device.type != "cuda" and not interpreted:
        raise RuntimeError(f"{op} is a GPU kernel, the tensors lie on {tensors[0].device}. Call {op}_reference there.")


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()
