"""Where the kernel cases run: on the GPU, or on the CPU in Triton's interpreter, repaired for bfloat16."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device whose tensors a kernel takes in this process."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return torch.device("cuda")
    from tests.kernels.interpreter_bf16 import install

    install()
    return torch.device("cpu")


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers of a test; drawn on the CPU, so that both devices see the same."""
    return torch.Generator().manual_seed(0)
