"""RMSNorm (Zhang and Sennrich 2019), rounded where transformers rounds.

Shapes: T rows, E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import HAS_TRITON, check, check_launchable, next_power_of_two

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def normed(
        x: tl.tensor,
        weight: tl.tensor,
        mask: tl.tensor,
        eps: tl.tensor,
        dtype: tl.constexpr,
        E: tl.constexpr,
        OFFSET: tl.constexpr,
        ROUNDS_LAST: tl.constexpr,
    ) -> tl.tensor:
        """Return the norm of a row in fp32, rounded to `dtype` before or after its weight; all arguments are fp32."""
        variance = tl.sum(tl.where(mask, x * x, 0.0), axis=0) / E
        y = x * tl.rsqrt(variance + eps)
        if ROUNDS_LAST:
            return (y * (OFFSET + weight)).to(dtype).to(tl.float32)
        return weight * y.to(dtype).to(tl.float32)

    @triton.jit
    def rms_norm_kernel(
        x_ptr: tl.tensor,
        weight_ptr: tl.tensor,
        out_ptr: tl.tensor,
        x_stride: tl.tensor,
        out_stride: tl.tensor,
        eps: tl.tensor,
        E: tl.constexpr,
        OFFSET: tl.constexpr,
        ROUNDS_LAST: tl.constexpr,
        BLOCK_E: tl.constexpr,
    ) -> None:
        """One program normalises one row."""
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK_E)
        mask = at < E
        x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = normed(x, weight, mask, eps, x_ptr.dtype.element_ty, E, OFFSET, ROUNDS_LAST)
        tl.store(out_ptr + row * out_stride + at, y.to(out_ptr.dtype.element_ty), mask=mask)


def norm_config(hidden_size: int) -> dict[str, int]:
    """Return tile size and warps of a row: a committed choice."""
    return {"BLOCK_E": next_power_of_two(hidden_size), "num_warps": 4 if hidden_size <= 2048 else 8}


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float, *, offset: float = 0.0, rounds_last: bool = False) -> Tensor:
    """Return weight * (x / rms(x)), computed in fp32 and rounded to the dtype of x before the weight.

    With `rounds_last` it is rounded after the weight, to which `offset` is added in fp32. Rows may be strided. Raises
    `ValueError` on shapes or strides that do not fit.
    """
    _check_shapes(x_TE, weight_E)
    for name, tensor in (("x", x_TE), ("weight", weight_E)):
        check(tensor.stride(-1) == 1 or tensor.shape[-1] == 1, f"rms_norm: {name} is not contiguous along E.")
    check_launchable("rms_norm", x_TE, weight_E)
    num_rows, hidden_size = x_TE.shape
    dtype = x_TE.dtype if rounds_last else torch.promote_types(x_TE.dtype, weight_E.dtype)
    out_TE = torch.empty((num_rows, hidden_size), dtype=dtype, device=x_TE.device)
    if num_rows:
        rms_norm_kernel[(num_rows,)](
            x_TE,
            weight_E,
            out_TE,
            x_TE.stride(0),
            out_TE.stride(0),
            eps,
            E=hidden_size,
            OFFSET=offset,
            ROUNDS_LAST=rounds_last,
            enable_fp_fusion=False,  # torch rounds after each operation; triton's own default differs by version
            **norm_config(hidden_size),
        )
    return out_TE


def rms_norm_reference(
    x_TE: Tensor, weight_E: Tensor, eps: float, *, offset: float = 0.0, rounds_last: bool = False
) -> Tensor:
    """Return what `rms_norm` does, on any device."""
    _check_shapes(x_TE, weight_E)
    x32_TE = x_TE.float()
    x32_TE = x32_TE * torch.rsqrt(x32_TE.pow(2).mean(-1, keepdim=True) + eps)
    if rounds_last:
        return (x32_TE * (offset + weight_E.float())).to(x_TE.dtype)
    return weight_E * x32_TE.to(x_TE.dtype)


def _check_shapes(x_TE: Tensor, weight_E: Tensor) -> None:
    x, weight = tuple(x_TE.shape), tuple(weight_E.shape)
    check(len(x) == 2 and x[1] > 0, f"rms_norm: x {x} is not [T, E] with at least one entry a row.")
    check(weight == x[1:], f"rms_norm: weight {weight} is not [{x[1]}].")
    for name, tensor in (("x", x_TE), ("weight", weight_E)):
        check(tensor.is_floating_point(), f"rms_norm: {name} is {tensor.dtype}, expected a floating point dtype.")
