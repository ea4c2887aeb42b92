"""Many copies between tensors of one device in one launch, cast on the way: new weights to where the old ones lie.

A table in device memory names pieces by their addresses. A launch for each tensor would cost more than the bytes do: a
model of 24 layers has 290, of which most are norms and biases.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .launch import HAS_TRITON, check, check_launchable

PIECE = 1 << 15
"""Elements that one program copies."""
BLOCK = 2048

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def copy_weights_kernel(
        table_ptr: tl.tensor,
        TARGET: tl.constexpr,
        SOURCE: tl.constexpr,
        ALIGNED: tl.constexpr,
        PIECE: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        """One program copies one piece: target, source and number of elements stand in its line of the table."""
        line = table_ptr + tl.program_id(0).to(tl.int64) * 3
        target = tl.load(line).to(tl.pointer_type(TARGET))
        source = tl.load(line + 1).to(tl.pointer_type(SOURCE))
        size = tl.load(line + 2)
        if ALIGNED:
            target, source = tl.multiple_of(target, 16), tl.multiple_of(source, 16)
        for first in range(0, PIECE, BLOCK):
            at = first + tl.arange(0, BLOCK)
            values = tl.load(source + at, mask=at < size, other=0.0)
            tl.store(target + at, values.to(TARGET), mask=at < size)

    _TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def copy_weights(pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Copy each (target, source) pair and return the number of launches: one for each pair of dtypes.

    All are contiguous, on one device, floating point of 16 or 32 bits. Targets and sources do not overlap. Raises
    `ValueError` on what does not fit.
    """
    tables: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for target, source in pairs:
        _check_pair(target, source)
        if target.numel():
            tables.setdefault((target.dtype, source.dtype), []).append((target, source))
    for (target_dtype, source_dtype), group in tables.items():
        check_launchable("copy_weights", *(tensor for pair in group for tensor in pair))
        table = piece_table(group)
        copy_weights_kernel[(len(table),)](
            table.to(group[0][0].device, non_blocking=True),
            TARGET=_TRITON[target_dtype],
            SOURCE=_TRITON[source_dtype],
            ALIGNED=not bool((table[:, :2] % 16).any()),
            PIECE=PIECE,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return len(tables)


def piece_table(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return [pieces, 3] int64 on the CPU: address of the target, of the source, and elements (at most `PIECE`)."""
    lines = []
    for target, source in pairs:
        first = torch.arange(0, target.numel(), PIECE)
        to, of = (tensor.data_ptr() + first * tensor.element_size() for tensor in (target, source))
        lines.append(torch.stack((to, of, (target.numel() - first).clamp(max=PIECE)), dim=1))
    return torch.cat(lines)


def copy_weights_reference(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Do what `copy_weights` does, one tensor at a time, strided ones too."""
    for target, source in pairs:
        check(target.shape == source.shape, f"copy_weights: {tuple(target.shape)} from {tuple(source.shape)}.")
        target.copy_(source, non_blocking=True)


def can_copy(target: Tensor, source: Tensor) -> bool:
    """Return whether `copy_weights` takes a pair."""
    dense = target.is_contiguous() and source.is_contiguous() and target.device == source.device
    return dense and target.shape == source.shape and _is_weight(target) and _is_weight(source)


def _is_weight(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _check_pair(target: Tensor, source: Tensor) -> None:
    shapes = f"{target.dtype} {tuple(target.shape)} from {source.dtype} {tuple(source.shape)}"
    check(can_copy(target, source), f"copy_weights: {shapes}; expected contiguous weights of one shape and device.")
