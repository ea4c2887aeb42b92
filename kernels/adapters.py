"""What LoRA adapters add to a projection, inside of the kernel that reads the projection anyway: without a launch.

A lies under the weight, so that one product gives [y | A x]; the kernel adds scaling * B (A x) to each of y's parts
(query, key, value; gate, up). Rounded as PEFT does: B (A x), its multiple, and the sum.

Shapes: T rows, N columns of a projection, C columns of all A x, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import HAS_TRITON, check

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def adapted(
        y: tl.tensor,
        tail_at: tl.tensor,
        b_at: tl.tensor,
        mask: tl.tensor,
        b_stride: tl.tensor,
        scaling: tl.tensor,
        dtype: tl.constexpr,
        RANK: tl.constexpr,
    ) -> tl.tensor:
        """Return y + scaling * B (A x) in fp32; `tail_at` and `b_at` point to rank 0 of the rows and of the columns."""
        delta = tl.zeros_like(y)
        for r in range(RANK):
            b = tl.load(b_at + r * b_stride, mask=mask, other=0.0).to(tl.float32)
            delta += tl.load(tail_at + r).to(tl.float32) * b
        delta = (delta.to(dtype).to(tl.float32) * scaling).to(dtype).to(tl.float32)
        return (y + delta).to(dtype).to(tl.float32)


@dataclass(frozen=True, slots=True)
class TailAdapters:
    """Adapters of one projection of which A x is known."""

    tail_TC: Tensor
    """A x of all parts, side by side, in the projection's dtype."""
    b_rN: Tensor
    """B of each column, transposed; zero below the rank of its part."""
    columns: tuple[int, ...]
    """Of each part: where its A x begins."""
    scalings: tuple[float, ...]
    """Of each part; 0 where there is no adapter."""

    @property
    def rank(self) -> int:
        return self.b_rN.shape[0]


def check_adapters(op: str, adapters: TailAdapters, *parts: Tensor) -> None:
    """Raise `ValueError` unless the adapters fit a projection of these parts, which lie side by side in B."""
    num_rows, width = parts[0].shape[0], sum(part.shape[1] for part in parts)
    tail, b, dtype = adapters.tail_TC, adapters.b_rN, parts[0].dtype
    check(tail.dim() == b.dim() == 2 and tail.shape[0] == num_rows, f"{op}: A x {tuple(tail.shape)} is not [T, C].")
    check(b.shape[1] == width and b.is_contiguous(), f"{op}: B {tuple(b.shape)} is not a contiguous [r, {width}].")
    check(tail.stride(1) == 1, f"{op}: A x is not contiguous along C.")
    check(tail.dtype == b.dtype == dtype, f"{op}: A x is {tail.dtype}, B {b.dtype}, the projection {dtype}.")
    counts = len(adapters.columns), len(adapters.scalings)
    check(counts == (len(parts),) * 2, f"{op}: columns and scalings of {counts} parts, expected {len(parts)}.")
    ends = max(adapters.columns) + adapters.rank
    check(ends <= tail.shape[1], f"{op}: A x has {tail.shape[1]} columns, the last part ends at {ends}.")


def adapted_reference(y_TN: Tensor, adapters: TailAdapters | None, sizes: Sequence[int]) -> Tensor:
    """Return a projection whose parts have these sizes with its adapters added, on any device."""
    if adapters is None:
        return y_TN
    parts = torch.split(y_TN, list(sizes), dim=1)
    check_adapters("adapted", adapters, *parts)
    b_parts = torch.split(adapters.b_rN, list(sizes), dim=1)
    out = [
        part + (adapters.tail_TC[:, column : column + adapters.rank] @ b) * scaling
        for part, b, column, scaling in zip(parts, b_parts, adapters.columns, adapters.scalings, strict=True)
    ]
    return torch.cat(out, dim=1)
