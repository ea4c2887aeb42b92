"""activation(gate) * up for the two halves of a packed projection, each rounded as torch rounds it.

Shapes: T rows, F width of a half.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import HAS_TRITON, check, check_launchable

Activation = Literal["silu", "gelu_tanh"]

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def gated_activation_kernel(
        gate_up_ptr: tl.tensor,
        out_ptr: tl.tensor,
        gate_up_stride: tl.tensor,
        out_stride: tl.tensor,
        SIZE: tl.constexpr,
        IS_SILU: tl.constexpr,
        BLOCK_F: tl.constexpr,
    ) -> None:
        """One program computes BLOCK_F columns of one row."""
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        mask = at < SIZE
        gate = tl.load(gate_up_ptr + row * gate_up_stride + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + row * gate_up_stride + SIZE + at, mask=mask, other=0.0).to(tl.float32)
        if IS_SILU:
            active = gate / (1.0 + tl.exp(-gate))
        else:
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            e = tl.exp(-2.0 * tl.abs(inner))
            tanh = (1.0 - e) / (1.0 + e)
            active = 0.5 * gate * (1.0 + tl.where(inner < 0.0, -tanh, tanh))
        dtype = out_ptr.dtype.element_ty
        out = active.to(dtype).to(tl.float32) * up
        tl.store(out_ptr + row * out_stride + at, out.to(dtype), mask=mask)


def gated_activation_config() -> dict[str, int]:
    """Return tile size and warps: a committed choice."""
    return {"BLOCK_F": 1024, "num_warps": 4}


def gated_activation(gate_up_TF: Tensor, activation: Activation) -> Tensor:
    """Return activation(first half) * second half, [T, F / 2]; gelu by its tanh approximation.

    Raises `ValueError` on shapes or strides that do not fit.
    """
    _check_shape(gate_up_TF)
    check(gate_up_TF.stride(1) == 1, "gated_activation: gate_up is not contiguous along F.")
    check_launchable("gated_activation", gate_up_TF)
    num_rows, size = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out_TF = torch.empty((num_rows, size), dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    config = gated_activation_config()
    if num_rows:
        gated_activation_kernel[(num_rows, -(-size // config["BLOCK_F"]))](
            gate_up_TF,
            out_TF,
            gate_up_TF.stride(0),
            out_TF.stride(0),
            SIZE=size,
            IS_SILU=activation == "silu",
            **config,
        )
    return out_TF


def gated_activation_reference(gate_up_TF: Tensor, activation: Activation) -> Tensor:
    """Return what `gated_activation` does, on any device."""
    _check_shape(gate_up_TF)
    gate, up = gate_up_TF.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def _check_shape(gate_up_TF: Tensor) -> None:
    shape = tuple(gate_up_TF.shape)
    check(len(shape) == 2 and shape[1] > 0 and shape[1] % 2 == 0, f"gated_activation: gate_up {shape} is not [T, 2 F].")
    check(gate_up_TF.is_floating_point(), f"gated_activation: gate_up is {gate_up_TF.dtype}, expected floating point.")
