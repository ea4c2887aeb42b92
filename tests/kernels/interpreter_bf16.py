"""bfloat16 in Triton's CPU interpreter, as the hardware has it.

The interpreter keeps bf16 as raw uint16 bits: it truncates where a GPU rounds to nearest even, and computes with the
bit patterns. `install()` repairs the conversions to and from fp32 and refuses all arithmetic on raw bf16, which our
kernels never do: they cast to fp32 right after each load. It patches private methods; seen with triton 3.9.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_QUIET_NAN = np.uint16(0x7FC0)


class RawBfloat16Error(TypeError):
    """A kernel computed with bf16 values without a cast to fp32."""


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """Exact: a bf16 value is the upper half of an fp32 value."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; every NaN becomes one quiet NaN."""
    fp32 = np.array(values, dtype=np.float32, order="C")
    bits = fp32.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    return np.where(np.isnan(fp32), _QUIET_NAN, (rounded >> 16).astype(np.uint16))


def _is_bf16(value: Any) -> bool:
    return getattr(value, "dtype", None) is not None and value.dtype.scalar == tl.bfloat16


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return original(self, src, dst_type)
        if source == tl.bfloat16:
            wide = TensorHandle(bf16_to_fp32(src.data), tl.float32)
            return wide if target == tl.float32 else original(self, wide, dst_type)
        wide = src if source == tl.float32 else original(self, src, tl.float32)
        return TensorHandle(fp32_to_bf16(wide.data), tl.bfloat16)

    return cast_impl


def _refuse(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def method(self: Any, *operands: Any, **keywords: Any) -> Any:
        flat = [v for o in operands for v in (o if isinstance(o, (tuple, list)) else (o,))]
        if any(_is_bf16(value) for value in flat):
            raise RawBfloat16Error(f"{name} on bf16: cast to fp32 after the load, round at the store")
        return original(self, *operands, **keywords)

    return method


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    """Multiply bf16 tiles exactly, in fp32, as tensor cores do."""

    def method(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> Any:
        wide = [TensorHandle(bf16_to_fp32(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b)]
        return original(self, *wide, d, *rest)

    return method


def install() -> None:
    """Patch the interpreter of this process; a second call does nothing."""
    builder = interpreter.InterpreterBuilder
    if builder.cast_impl.__module__ == __name__:
        return
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_dot = _dot(builder.create_dot)
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_atomic_rmw"):
        setattr(builder, name, _refuse(getattr(builder, name), name))
    for owner in (interpreter.ReduceOps, interpreter.ScanOps):
        owner.apply_impl = _refuse(owner.apply_impl, owner.__name__)
