"""What a device remembers of each sequence that decodes there: the columns that a step's first and last kernel share.

Shapes: S state rows, I integer columns, F float columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import check

TOKEN, POSITION, LIMIT, DONE, SEED, INDEX, TOP_K, FIRST_STOP = range(8)
"""Integer columns: the token that is computed next and its position; the number of tokens at which the row ends;
whether it has (1); the key of its draws; top-k; from FIRST_STOP to the last column stop token ids, -1 where none."""
TEMPERATURE, TOP_P, MIN_P = range(3)
"""Float columns."""
NUM_FLOATS = 3


@dataclass(frozen=True)
class RowState:
    """State rows. 64-bit keys are kept as the int64 of the same bits."""

    ints_SI: Tensor
    floats_SF: Tensor

    @classmethod
    def allocate(cls, num_rows: int, num_stops: int, device: torch.device) -> RowState:
        """Return rows that have all ended."""
        ints_SI = torch.zeros((num_rows, FIRST_STOP + num_stops), dtype=torch.int64, device=device)
        ints_SI[:, DONE] = 1
        ints_SI[:, FIRST_STOP:] = -1
        return cls(ints_SI, torch.ones((num_rows, NUM_FLOATS), dtype=torch.float32, device=device))

    def check(self, op: str) -> None:
        """Raise `ValueError` unless the two tensors are one state."""
        ints, floats = tuple(self.ints_SI.shape), tuple(self.floats_SF.shape)
        check(
            len(ints) == 2 and ints[1] >= FIRST_STOP and floats == (ints[0], NUM_FLOATS),
            f"{op}: state {ints} and {floats} are not [S, {FIRST_STOP} + stops] and [S, {NUM_FLOATS}].",
        )
        check(
            self.ints_SI.dtype == torch.int64 and self.floats_SF.dtype == torch.float32,
            f"{op}: state is {self.ints_SI.dtype} and {self.floats_SF.dtype}, expected int64 and float32.",
        )
        check(self.ints_SI.is_contiguous() and self.floats_SF.is_contiguous(), f"{op}: state is not contiguous.")
