"""Adapters whose A lies under the weight of a packed map, so that one product gives [y | A x] (column append).

The rows are reserved when the weight is packed: to append them later would take the memory of a second model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RANK_MULTIPLE = 16
"""A part's A x takes this many columns or a multiple: a product in 16 bits wants its width so."""


@dataclass(frozen=True, slots=True)
class LoraSlice:
    """An adapter pair whose product is added to the output columns `start : stop` of a packed linear map."""

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class AppendedLora:
    """The adapters of one packed map, laid out for the kernels that read it (`kernels/adapters.py`).

    N columns of the map, C of all A x, K inputs, r rank rounded up.
    """

    weight: Tensor
    """[N + C, K]: the map's weight, and the reserved rows below it."""
    bias: Tensor | None
    """[N + C], zero below N."""
    a_CK: Tensor
    b_rN: Tensor
    columns: tuple[int, ...]
    scalings: tuple[float, ...]

    def install(self) -> None:
        """Write A below the weight: between two steps, as what serves reads it."""
        self.weight[-self.a_CK.shape[0] :].copy_(self.a_CK, non_blocking=True)


def round_rank(rank: int) -> int:
    """Return the columns that an adapter of this rank takes."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def reserved(shape: tuple[int, ...], num_spare: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor that is not filled, with `num_spare` rows of zeros below it in the same memory."""
    whole = torch.empty((shape[0] + num_spare, *shape[1:]), dtype=dtype, device=device)
    whole[shape[0] :] = 0
    return whole[: shape[0]]


def reused(
    old: Tensor | None, shape: tuple[int, ...], num_spare: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return such a tensor in the memory of `old`, if that is one; else a new one."""
    fits = old is not None and old.shape == shape and old.dtype == dtype and old.device == device
    if old is None or not fits or _spare_rows(old) != num_spare:
        return reserved(shape, num_spare, dtype, device)
    again = old[:]  # another object: what is kept by the old one's identity is not this version's
    _with_spare(again, num_spare)[shape[0] :] = 0
    return again


def cloned(weight: Tensor) -> Tensor:
    """Return a copy with as many rows free below it."""
    copy = reserved(tuple(weight.shape), _spare_rows(weight), weight.dtype, weight.device)
    copy.copy_(weight)
    return copy


def append(
    weight: Tensor, bias: Tensor | None, slices: Sequence[LoraSlice], starts: Sequence[int]
) -> AppendedLora | None:
    """Return adapters below the weight whose parts begin at columns `starts`; None where they cannot lie there.

    They cannot without rows enough that were reserved, nor where they are multiplied in another dtype than the weight.
    A slice may span several parts (Phi-3's fused projections); none ends inside of one.
    """
    rank = round_rank(max(cut.a.shape[0] for cut in slices))
    num_rows, num_spare = rank * len(slices), _spare_rows(weight)
    if num_rows > num_spare or any({cut.a.dtype, cut.b.dtype} != {weight.dtype} for cut in slices):
        return None
    a_CK = weight.new_zeros((num_rows, weight.shape[1]))
    b_rN = weight.new_zeros((rank, weight.shape[0]))
    for i, cut in enumerate(slices):
        a_CK[i * rank : i * rank + cut.a.shape[0]] = cut.a
        b_rN[: cut.b.shape[1], cut.start : cut.stop] = cut.b.t()
    columns, scalings = [], []
    for start in starts:
        found = [i for i, cut in enumerate(slices) if cut.start <= start < cut.stop]
        columns.append(found[0] * rank if found else 0)
        scalings.append(slices[found[0]].scaling if found else 0.0)
    whole = _with_spare(weight, num_rows)
    return AppendedLora(
        whole, None if bias is None else _with_spare(bias, num_rows), a_CK, b_rN, tuple(columns), tuple(scalings)
    )


def _spare_rows(tensor: Tensor) -> int:
    """Return how many rows `reserved` left below a tensor."""
    if tensor.storage_offset() or not tensor.is_contiguous():
        return 0
    width = tensor[0].numel()
    return tensor.untyped_storage().nbytes() // (tensor.element_size() * width) - tensor.shape[0]


def _with_spare(tensor: Tensor, num_spare: int) -> Tensor:
    shape = (tensor.shape[0] + num_spare, *tensor.shape[1:])
    return tensor.as_strided(shape, tensor.stride())
