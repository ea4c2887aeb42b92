"""Begin a decode step: what the model and the draw read, gathered from the state of the rows that take part.

Shapes: R rows of this step, S state rows, M blocks of a table.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .launch import HAS_TRITON, check, check_launchable
from .row_state import DONE, INDEX, MIN_P, POSITION, SEED, TEMPERATURE, TOKEN, TOP_K, TOP_P, RowState

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def begin_step_kernel(
        active_ptr: tl.tensor,
        ints_ptr: tl.tensor,
        floats_ptr: tl.tensor,
        tables_ptr: tl.tensor,
        token_ptr: tl.tensor,
        position_ptr: tl.tensor,
        slot_ptr: tl.tensor,
        len_ptr: tl.tensor,
        draw_position_ptr: tl.tensor,
        seed_ptr: tl.tensor,
        index_ptr: tl.tensor,
        top_k_ptr: tl.tensor,
        temperature_ptr: tl.tensor,
        top_p_ptr: tl.tensor,
        min_p_ptr: tl.tensor,
        num_rows: tl.tensor,
        ints_stride: tl.tensor,
        floats_stride: tl.tensor,
        tables_stride: tl.tensor,
        scratch_slot: tl.tensor,
        B: tl.constexpr,
        TOKEN: tl.constexpr,
        POSITION: tl.constexpr,
        DONE: tl.constexpr,
        SEED: tl.constexpr,
        INDEX: tl.constexpr,
        TOP_K: tl.constexpr,
        TEMPERATURE: tl.constexpr,
        TOP_P: tl.constexpr,
        MIN_P: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ) -> None:
        """One program gathers BLOCK_R rows."""
        at = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = at < num_rows
        row = tl.load(active_ptr + at, mask=mask, other=0).to(tl.int64)
        ints = ints_ptr + row * ints_stride
        floats = floats_ptr + row * floats_stride
        live = mask & (tl.load(ints + DONE, mask=mask, other=1) == 0)
        position = tl.load(ints + POSITION, mask=live, other=0)
        block = tl.load(tables_ptr + at * tables_stride + position // B, mask=live, other=0).to(tl.int64)
        slot = tl.where(live, block * B + position % B, scratch_slot)
        tl.store(token_ptr + at, tl.load(ints + TOKEN, mask=live, other=0), mask=mask)
        tl.store(position_ptr + at, position, mask=mask)
        tl.store(slot_ptr + at, slot, mask=mask)
        tl.store(len_ptr + at, tl.where(live, position + 1, 0).to(tl.int32), mask=mask)
        tl.store(draw_position_ptr + at, position + 1, mask=mask)
        tl.store(seed_ptr + at, tl.load(ints + SEED, mask=mask, other=0), mask=mask)
        tl.store(index_ptr + at, tl.load(ints + INDEX, mask=mask, other=0), mask=mask)
        tl.store(top_k_ptr + at, tl.load(ints + TOP_K, mask=mask, other=0), mask=mask)
        tl.store(temperature_ptr + at, tl.load(floats + TEMPERATURE, mask=live, other=-1.0), mask=mask)
        tl.store(top_p_ptr + at, tl.load(floats + TOP_P, mask=mask, other=1.0), mask=mask)
        tl.store(min_p_ptr + at, tl.load(floats + MIN_P, mask=mask, other=0.0), mask=mask)


BLOCK_R = 128


@dataclass(frozen=True)
class StepRows:
    """What a step reads of each of its rows.

    One that has ended computes token 0 at position 0, attends to nothing, and is marked as one that draws nothing.
    """

    token_id_R: Tensor
    position_R: Tensor
    slot_R: Tensor
    len_R: Tensor
    """Tokens that the row attends to, itself included: int32, 0 where it has ended."""
    draw_position_R: Tensor
    """Position of the token that is drawn."""
    seed_R: Tensor
    index_R: Tensor
    top_k_R: Tensor
    temperature_R: Tensor
    """-1 where it has ended."""
    top_p_R: Tensor
    min_p_R: Tensor

    @classmethod
    def allocate(cls, num_rows: int, device: torch.device) -> StepRows:
        """Return zeroed rows."""
        dtypes = [torch.int64] * 3 + [torch.int32] + [torch.int64] * 4 + [torch.float32] * 3
        return cls(*(torch.zeros(num_rows, dtype=dtype, device=device) for dtype in dtypes))

    def first(self, num_rows: int) -> StepRows:
        """Return the first rows, in the same memory."""
        return StepRows(*(tensor[:num_rows] for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """Return all of them, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


def begin_step(
    active_R: Tensor, state: RowState, block_tables_RM: Tensor, rows: StepRows, *, block_size: int, scratch_slot: int
) -> None:
    """Fill `rows` with what state rows `active_R` (int32 or int64) need; several may name one row that has ended.

    Rows that have ended store their keys and values to `scratch_slot`. Raises `ValueError` on shapes or dtypes that do
    not fit.
    """
    _check_shapes(active_R, state, block_tables_RM, rows)
    check(block_tables_RM.stride(1) == 1 or block_tables_RM.shape[1] == 1, "begin_step: tables are not contiguous.")
    check_launchable("begin_step", active_R, state.ints_SI, state.floats_SF, block_tables_RM, *rows.tensors())
    num_rows = active_R.shape[0]
    begin_step_kernel[(-(-num_rows // BLOCK_R),)](
        active_R,
        state.ints_SI,
        state.floats_SF,
        block_tables_RM,
        *rows.tensors(),
        num_rows,
        state.ints_SI.stride(0),
        state.floats_SF.stride(0),
        block_tables_RM.stride(0),
        scratch_slot,
        B=block_size,
        TOKEN=TOKEN,
        POSITION=POSITION,
        DONE=DONE,
        SEED=SEED,
        INDEX=INDEX,
        TOP_K=TOP_K,
        TEMPERATURE=TEMPERATURE,
        TOP_P=TOP_P,
        MIN_P=MIN_P,
        BLOCK_R=BLOCK_R,
        num_warps=4,
    )


def begin_step_reference(
    active_R: Tensor, state: RowState, block_tables_RM: Tensor, rows: StepRows, *, block_size: int, scratch_slot: int
) -> None:
    """Do what `begin_step` does, on any device."""
    _check_shapes(active_R, state, block_tables_RM, rows)
    ints_RI, floats_RF = state.ints_SI[active_R], state.floats_SF[active_R]
    ended_R = ints_RI[:, DONE] != 0
    position_R = ints_RI[:, POSITION].masked_fill(ended_R, 0)
    block_R = block_tables_RM.gather(1, (position_R // block_size)[:, None])[:, 0].long()
    rows.token_id_R.copy_(ints_RI[:, TOKEN].masked_fill(ended_R, 0))
    rows.position_R.copy_(position_R)
    rows.slot_R.copy_((block_R * block_size + position_R % block_size).masked_fill(ended_R, scratch_slot))
    rows.len_R.copy_((position_R + 1).masked_fill(ended_R, 0))
    rows.draw_position_R.copy_(position_R + 1)
    rows.seed_R.copy_(ints_RI[:, SEED])
    rows.index_R.copy_(ints_RI[:, INDEX])
    rows.top_k_R.copy_(ints_RI[:, TOP_K])
    rows.temperature_R.copy_(floats_RF[:, TEMPERATURE].masked_fill(ended_R, -1.0))
    rows.top_p_R.copy_(floats_RF[:, TOP_P])
    rows.min_p_R.copy_(floats_RF[:, MIN_P])


def _check_shapes(active_R: Tensor, state: RowState, block_tables_RM: Tensor, rows: StepRows) -> None:
    state.check("begin_step")
    num_rows = active_R.shape[0]
    tables = tuple(block_tables_RM.shape)
    check(active_R.ndim == 1 and num_rows > 0, f"begin_step: active {tuple(active_R.shape)} is not [R], R > 0.")
    check(len(tables) == 2 and tables[0] == num_rows, f"begin_step: tables {tables} are not [{num_rows}, M].")
    for field, tensor in zip(fields(rows), rows.tensors(), strict=True):
        check(
            tuple(tensor.shape) == (num_rows,) and tensor.is_contiguous(),
            f"begin_step: {field.name} {tuple(tensor.shape)} is not a contiguous [{num_rows}].",
        )
