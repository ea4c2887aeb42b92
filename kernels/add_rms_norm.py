"""Residual addition and RMSNorm (Zhang and Sennrich 2019) in one pass, rounded where transformers rounds.

Shapes: T rows, E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adapters import TailAdapters, adapted_reference, check_adapters
from .launch import HAS_TRITON, check, check_launchable
from .rms_norm import norm_config, rms_norm_reference

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .adapters import adapted
    from .rms_norm import normed

    @triton.jit
    def add_rms_norm_kernel(
        x_ptr: tl.tensor,
        residual_ptr: tl.tensor,
        weight_ptr: tl.tensor,
        out_ptr: tl.tensor,
        sum_ptr: tl.tensor,
        tail_ptr: tl.tensor,
        b_ptr: tl.tensor,
        x_stride: tl.tensor,
        residual_stride: tl.tensor,
        out_stride: tl.tensor,
        sum_stride: tl.tensor,
        tail_stride: tl.tensor,
        scaling: tl.tensor,
        eps: tl.tensor,
        E: tl.constexpr,
        OFFSET: tl.constexpr,
        ROUNDS_LAST: tl.constexpr,
        RANK: tl.constexpr,
        BLOCK_E: tl.constexpr,
    ) -> None:
        """One program normalises one row, whose adapter (RANK > 0) it adds first.

        Each `.to` is a rounding point of the reference.
        """
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK_E)
        mask = at < E
        x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
        if RANK > 0:
            x = adapted(x, tail_ptr + row * tail_stride, b_ptr + at, mask, E, scaling, x_ptr.dtype.element_ty, RANK)
        residual = tl.load(residual_ptr + row * residual_stride + at, mask=mask, other=0.0).to(tl.float32)
        total = (x + residual).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * sum_stride + at, total, mask=mask)
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = normed(total.to(tl.float32), weight, mask, eps, sum_ptr.dtype.element_ty, E, OFFSET, ROUNDS_LAST)
        tl.store(out_ptr + row * out_stride + at, y.to(out_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    x_TE: Tensor,
    residual_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_last: bool = False,
    adapters: TailAdapters | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (weight * norm(s), s) with s = x + residual.

    s has the dtype to which torch promotes x and residual; the norm is computed in fp32, rounded to the dtype of s, and
    multiplied by the weight, which may promote once more. With `rounds_last` it is rounded after the weight, to which
    `offset` is added in fp32. `adapters` are those of x, of one part. Raises `ValueError` on shapes or strides that do
    not fit.
    """
    _check_shapes(x_TE, residual_TE, weight_E)
    if adapters is not None:
        check_adapters("add_rms_norm", adapters, x_TE)
    for name, tensor in (("x", x_TE), ("residual", residual_TE), ("weight", weight_E)):
        check(tensor.stride(-1) == 1 or tensor.shape[-1] == 1, f"add_rms_norm: {name} is not contiguous along E.")
    check_launchable("add_rms_norm", x_TE, residual_TE, weight_E)
    num_rows, hidden_size = x_TE.shape
    sum_dtype = torch.promote_types(x_TE.dtype, residual_TE.dtype)
    sum_TE = torch.empty(num_rows, hidden_size, dtype=sum_dtype, device=x_TE.device)
    out_dtype = sum_dtype if rounds_last else torch.promote_types(sum_dtype, weight_E.dtype)
    out_TE = torch.empty_like(sum_TE, dtype=out_dtype)
    if num_rows:
        add_rms_norm_kernel[(num_rows,)](
            x_TE,
            residual_TE,
            weight_E,
            out_TE,
            sum_TE,
            x_TE if adapters is None else adapters.tail_TC,
            x_TE if adapters is None else adapters.b_rN,
            x_TE.stride(0),
            residual_TE.stride(0),
            out_TE.stride(0),
            sum_TE.stride(0),
            0 if adapters is None else adapters.tail_TC.stride(0),
            0.0 if adapters is None else adapters.scalings[0],
            eps,
            E=hidden_size,
            OFFSET=offset,
            ROUNDS_LAST=rounds_last,
            RANK=0 if adapters is None else adapters.rank,
            enable_fp_fusion=False,  # torch rounds after each operation; triton's own default differs by version
            **norm_config(hidden_size),
        )
    return out_TE, sum_TE


def add_rms_norm_reference(
    x_TE: Tensor,
    residual_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_last: bool = False,
    adapters: TailAdapters | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `add_rms_norm` does, on any device."""
    _check_shapes(x_TE, residual_TE, weight_E)
    sum_TE = adapted_reference(x_TE, adapters, x_TE.shape[1:]) + residual_TE
    return rms_norm_reference(sum_TE, weight_E, eps, offset=offset, rounds_last=rounds_last), sum_TE


def _check_shapes(x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor) -> None:
    x, residual, weight = tuple(x_TE.shape), tuple(residual_TE.shape), tuple(weight_E.shape)
    check(len(x) == 2 and residual == x, f"add_rms_norm: x {x} and residual {residual} are not one [T, E].")
    check(weight == x[1:] and x[1] > 0, f"add_rms_norm: weight {weight} is not [{x[1]}] with at least one entry.")
    for name, tensor in (("x", x_TE), ("residual", residual_TE), ("weight", weight_E)):
        check(tensor.is_floating_point(), f"add_rms_norm: {name} is {tensor.dtype}, expected a floating point dtype.")
