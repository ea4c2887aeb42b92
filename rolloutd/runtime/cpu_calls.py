"""The structures of cpu_calls.h and cpu_step.c, field by field."""

from __future__ import annotations

import ctypes
from typing import ClassVar, TypeAlias

from torch import Tensor

_i64, _f32, _ptr = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

Value: TypeAlias = "Tensor | int | float | None"
"""Of a field; a tensor stands for its address."""


class Arguments(ctypes.Structure):
    """What one call is given."""

    rows: ClassVar[str] = "T"
    """The field that says how many rows the call computes."""

    @classmethod
    def of(cls, values: dict[str, Value]) -> Arguments:
        """Return the structure with these values; whoever uses it keeps the tensors alive."""
        return cls(**{name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in values.items()})


class Embedding(Arguments):
    _fields_ = [("ids", _ptr), ("table", _ptr), ("out", _ptr), ("T", _i64), ("V", _i64), ("E", _i64), ("scale", _f32)]


class Norm(Arguments):
    _fields_ = (
        [(name, _ptr) for name in ("x", "residual", "weight", "out", "sum")]
        + [(name, _i64) for name in ("x_row", "T", "E")]
        + [(name, _f32) for name in ("eps", "offset")]
    )


class Product(Arguments):
    rows = "M"
    _fields_ = (
        [(name, _ptr) for name in ("x", "packed", "bias", "y")]
        + [(name, _i64) for name in ("x_row", "y_row", "M", "N", "K", "adds")]
        + [("scale", _f32)]
    )


class Rope(Arguments):
    _fields_ = (
        [(name, _ptr) for name in ("q", "k", "v", "q_norm", "k_norm", "cos", "sin", "positions", "slots")]
        + [(name, _ptr) for name in ("out", "k_cache", "v_cache")]
        + [(name, _i64) for name in ("q_row", "k_row", "v_row", "table_row", "k_block", "k_place", "k_head")]
        + [(name, _i64) for name in ("v_block", "v_place", "v_head", "T", "num_stored", "H", "K", "D", "B", "turned")]
        + [(name, _f32) for name in ("eps", "offset")]
    )


class Attention(Arguments):
    _fields_ = (
        [(name, _ptr) for name in ("q", "k", "v", "out", "tables", "lens")]
        + [(name, _i64) for name in ("q_row", "q_head", "k_block", "k_place", "k_head")]
        + [(name, _i64) for name in ("v_block", "v_place", "v_head", "out_row", "out_head")]
        + [(name, _i64) for name in ("T", "R", "H", "K", "D", "B", "M", "window", "item_rows")]
        + [(name, _f32) for name in ("scale", "softcap")]
    )


class Gated(Arguments):
    _fields_ = [("gate_up", _ptr), ("out", _ptr)] + [(name, _i64) for name in ("row", "T", "F", "is_silu")]


KINDS: tuple[type[Arguments], ...] = (Embedding, Norm, Product, Rope, Attention, Gated)
"""In the order of the enumeration in cpu_step.c."""


class Call(ctypes.Structure):
    """A kind and the address of its arguments."""

    _fields_ = [("kind", _i64), ("arguments", _ptr)]


class StepInputs(ctypes.Structure):
    """What differs from step to step: `Inputs` of cpu_step.c."""

    TENSORS: ClassVar[tuple[str, ...]] = ("ids", "positions", "slots", "tables", "lens")
    _fields_ = [(name, _ptr) for name in TENSORS] + [(name, _i64) for name in ("T", "R", "num_stored", "M")]
