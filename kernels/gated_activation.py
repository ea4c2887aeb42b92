"""activation(gate) * up for the two halves of a packed projection, each rounded as torch rounds it.

Shapes: T rows, F width of a half.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import TailAdapters, adapted_reference, check_adapters
from .launch import HAS_TRITON, check, check_launchable

Activation = Literal["silu", "gelu_tanh"]

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .adapters import adapted

    @triton.jit
    def gated_activation_kernel(
        gate_up_ptr: tl.tensor,
        out_ptr: tl.tensor,
        tail_ptr: tl.tensor,
        b_ptr: tl.tensor,
        num_rows: tl.tensor,
        gate_up_stride: tl.tensor,
        out_stride: tl.tensor,
        tail_stride: tl.tensor,
        gate_column: tl.tensor,
        up_column: tl.tensor,
        gate_scaling: tl.tensor,
        up_scaling: tl.tensor,
        SIZE: tl.constexpr,
        IS_SILU: tl.constexpr,
        RANK: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_F: tl.constexpr,
    ) -> None:
        """One program computes BLOCK_F columns of BLOCK_R rows, and adds their adapters (RANK > 0) first."""
        rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = tl.minimum(rows, num_rows - 1).to(tl.int64)
        at = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
        mask = at < SIZE
        gate_at = gate_up_ptr + row * gate_up_stride + at
        gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_at + SIZE, mask=mask, other=0.0).to(tl.float32)
        if RANK > 0:
            raw: tl.constexpr = gate_up_ptr.dtype.element_ty
            tail_at, b_at = tail_ptr + row * tail_stride, b_ptr + at
            gate = adapted(gate, tail_at + gate_column, b_at, mask, 2 * SIZE, gate_scaling, raw, RANK)
            up = adapted(up, tail_at + up_column, b_at + SIZE, mask, 2 * SIZE, up_scaling, raw, RANK)
        if IS_SILU:
            active = gate / (1.0 + tl.exp(-gate))
        else:
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            e = tl.exp(-2.0 * tl.abs(inner))
            tanh = (1.0 - e) / (1.0 + e)
            active = 0.5 * gate * (1.0 + tl.where(inner < 0.0, -tanh, tanh))
        dtype = out_ptr.dtype.element_ty
        out = active.to(dtype).to(tl.float32) * up
        tl.store(out_ptr + row * out_stride + at, out.to(dtype), mask=mask & (rows < num_rows))


def gated_activation_config(rank: int) -> dict[str, int]:
    """Return tile sizes and warps: a committed choice. With adapters 8 rows share what a program reads of B."""
    return {"BLOCK_R": 8 if rank else 1, "BLOCK_F": 256 if rank else 1024, "num_warps": 4}


def gated_activation(gate_up_TF: Tensor, activation: Activation, adapters: TailAdapters | None = None) -> Tensor:
    """Return activation(first half) * second half, [T, F / 2]; gelu by its tanh approximation.

    `adapters` are those of gate and up. Raises `ValueError` on shapes or strides that do not fit.
    """
    _check_shape(gate_up_TF)
    if adapters is not None:
        check_adapters("gated_activation", adapters, *gate_up_TF.chunk(2, dim=1))
    check(gate_up_TF.stride(1) == 1, "gated_activation: gate_up is not contiguous along F.")
    check_launchable("gated_activation", gate_up_TF)
    num_rows, size = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out_TF = torch.empty((num_rows, size), dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    rank = 0 if adapters is None else adapters.rank
    config = gated_activation_config(rank)
    if num_rows:
        gated_activation_kernel[(-(-num_rows // config["BLOCK_R"]), -(-size // config["BLOCK_F"]))](
            gate_up_TF,
            out_TF,
            gate_up_TF if adapters is None else adapters.tail_TC,
            gate_up_TF if adapters is None else adapters.b_rN,
            num_rows,
            gate_up_TF.stride(0),
            out_TF.stride(0),
            0 if adapters is None else adapters.tail_TC.stride(0),
            *((0, 0) if adapters is None else adapters.columns),
            *((0.0, 0.0) if adapters is None else adapters.scalings),
            SIZE=size,
            IS_SILU=activation == "silu",
            RANK=rank,
            enable_fp_fusion=False,  # torch rounds after each operation
            **config,
        )
    return out_TF


def gated_activation_reference(
    gate_up_TF: Tensor, activation: Activation, adapters: TailAdapters | None = None
) -> Tensor:
    """Return what `gated_activation` does, on any device."""
    _check_shape(gate_up_TF)
    half = gate_up_TF.shape[1] // 2
    gate, up = adapted_reference(gate_up_TF, adapters, (half, half)).chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def _check_shape(gate_up_TF: Tensor) -> None:
    shape = tuple(gate_up_TF.shape)
    check(len(shape) == 2 and shape[1] > 0 and shape[1] % 2 == 0, f"gated_activation: gate_up {shape} is not [T, 2 F].")
    check(gate_up_TF.is_floating_point(), f"gated_activation: gate_up is {gate_up_TF.dtype}, expected floating point.")
