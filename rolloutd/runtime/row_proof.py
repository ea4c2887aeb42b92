"""Proof, on the machine at hand, of the row counts in which a product gives a row the same bits.

Which kernel computes a row of a matrix product depends on how many rows there are and how threads share them; no
library promises that two kernels agree to the last bit. So they are compared: 4,096 numbers or more for each count,
which also tells apart kernels that agree on most numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RowProduct = Callable[[Tensor], Tensor]
"""[M, K] -> [M, N]."""

PROOF_FLOPS = 1e11
"""Spent at most on one shape: about a second on two cores. The largest heads get smaller products for it."""
NUM_VALUES = 4096
"""Numbers compared at least, where so many rows are affordable."""


def proven_counts(product: RowProduct, x_MK: Tensor, num_out: int, candidates: Sequence[int]) -> tuple[int, ...]:
    """Return the candidates (given in rising order), largest first, in which a row's bits are the same; or none.

    `x_MK` are rows to try it on. The smallest count that is returned gives a row the same bits at every place and
    beside any other rows; every larger one gives each row the bits of the smallest.
    """
    flops_per_row = 2.0 * x_MK.shape[1] * num_out
    for i, few in enumerate(candidates):
        larger = _affordable(candidates[i:], flops_per_row)
        num_rows = max(larger[-1], -(-NUM_VALUES // num_out))
        x = x_MK[: num_rows // few * few]
        reference = _in_parts(product, x, few)
        if _stands_anywhere(product, x, reference, few, num_out):
            equal = [m for m in larger if _agrees(product, x, reference, m, num_out)]
            return tuple(reversed(equal))
    return ()


def _affordable(counts: Sequence[int], flops_per_row: float) -> list[int]:
    """Return the counts, from the first on, whose proofs together stay within the budget; the first in any case."""
    kept: list[int] = []
    for count in counts:
        if kept and flops_per_row * (sum(kept) + 2 * count) > PROOF_FLOPS:
            break
        kept.append(count)
    return kept


def _in_parts(product: RowProduct, x: Tensor, count: int) -> Tensor:
    return torch.cat([product(part) for part in torch.split(x, count)])


def _some(x: Tensor, count: int, num_out: int) -> int:
    """Return how many rows, in whole products of `count`, make `NUM_VALUES` numbers."""
    num_products = max(1, min(x.shape[0] // count, -(-NUM_VALUES // (count * num_out))))
    return num_products * count


def _stands_anywhere(product: RowProduct, x: Tensor, reference: Tensor, few: int, num_out: int) -> bool:
    """Return whether rows have the bits of `reference` at every other place of a product of `few`."""
    n = _some(x, few, num_out)
    return all(
        torch.equal(_in_parts(product, x.roll(shift, 0)[:n], few), reference.roll(shift, 0)[:n])
        for shift in range(1, few)
    )


def _agrees(product: RowProduct, x: Tensor, reference: Tensor, count: int, num_out: int) -> bool:
    if count > x.shape[0]:
        return False
    n = _some(x, count, num_out)
    return torch.equal(_in_parts(product, x[:n], count), reference[:n])


def rows_for_proof(num_rows: int, num_in: int, like: Tensor) -> Tensor:
    """Return random rows in the dtype and on the device of `like`; the same in every process."""
    generator = torch.Generator().manual_seed(num_in)
    return torch.randn((num_rows, num_in), generator=generator).to(like.device, like.dtype)
