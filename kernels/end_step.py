"""End a decode step: record what was drawn, see which rows end with it, and set what the next step computes.

Shapes: R rows of this step, S state rows, C cells of the record, W its columns (at least R).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import HAS_TRITON, check, check_launchable
from .row_state import DONE, FIRST_STOP, LIMIT, POSITION, TOKEN, RowState

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def end_step_kernel(
        token_ptr: tl.tensor,
        logprob_ptr: tl.tensor,
        sampling_logprob_ptr: tl.tensor,
        active_ptr: tl.tensor,
        ints_ptr: tl.tensor,
        cursor_ptr: tl.tensor,
        record_ptr: tl.tensor,
        record_float_ptr: tl.tensor,
        num_rows: tl.tensor,
        num_cells: tl.tensor,
        ints_stride: tl.tensor,
        record_stride: tl.tensor,
        cells_apart: tl.tensor,
        TOKEN: tl.constexpr,
        POSITION: tl.constexpr,
        LIMIT: tl.constexpr,
        DONE: tl.constexpr,
        FIRST_STOP: tl.constexpr,
        NUM_STOPS: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ) -> None:
        """One program ends BLOCK_R rows. A row that has not ended is named once, so no two threads write one state."""
        at = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = at < num_rows
        row = tl.load(active_ptr + at, mask=mask, other=0).to(tl.int64)
        ints = ints_ptr + row * ints_stride
        live = mask & (tl.load(ints + DONE, mask=mask, other=1) == 0)
        token = tl.load(token_ptr + at, mask=live, other=0).to(tl.int64)
        logprob = tl.load(logprob_ptr + at, mask=live, other=0.0).to(tl.float32)
        sampling_logprob = tl.load(sampling_logprob_ptr + at, mask=live, other=0.0).to(tl.float32)
        cursor = tl.load(cursor_ptr + at, mask=live, other=0).to(tl.int64)
        fits = live & (cursor >= 0) & (cursor + 2 * cells_apart < num_cells)
        cell = cursor * record_stride + at
        apart = cells_apart * record_stride
        tl.store(record_ptr + cell, token.to(tl.int32), mask=fits)
        tl.store(record_float_ptr + cell + apart, logprob, mask=fits)
        tl.store(record_float_ptr + cell + 2 * apart, sampling_logprob, mask=fits)
        tl.store(cursor_ptr + at, (cursor + 1).to(tl.int32), mask=live)
        position = tl.load(ints + POSITION, mask=live, other=0) + 1
        ends = position + 1 >= tl.load(ints + LIMIT, mask=live, other=0)
        for i in tl.static_range(NUM_STOPS):
            ends = ends | (token == tl.load(ints + FIRST_STOP + i, mask=live, other=-1))
        tl.store(ints + TOKEN, token, mask=live)
        tl.store(ints + POSITION, position, mask=live)
        tl.store(ints + DONE, ends.to(tl.int64), mask=live)


BLOCK_R = 128


def end_step(
    token_R: Tensor,
    logprob_R: Tensor,
    sampling_logprob_R: Tensor,
    active_R: Tensor,
    state: RowState,
    cursor_R: Tensor,
    record_CW: Tensor,
    *,
    cells_apart: int,
) -> None:
    """Record the draws of rows that have not ended, and advance these rows; others change nothing.

    Row r's token goes to column r and cell `cursor_R[r]` of the int32 record, the bits of its two fp32
    log-probabilities `cells_apart` and twice as many cells below; then the cursor (int32) rises by one. The row ends
    with a stop token, or where as many tokens are known as its limit. A cell outside the record is not written: a
    kernel cannot report it without a synchronisation, the reference raises. Raises `ValueError` on shapes or dtypes
    that do not fit.
    """
    _check_shapes(token_R, logprob_R, sampling_logprob_R, active_R, state, cursor_R, record_CW)
    tensors = token_R, logprob_R, sampling_logprob_R, active_R, state.ints_SI, cursor_R, record_CW
    check_launchable("end_step", *tensors)
    num_rows = active_R.shape[0]
    end_step_kernel[(-(-num_rows // BLOCK_R),)](
        *tensors,
        record_CW.view(torch.float32),
        num_rows,
        record_CW.shape[0],
        state.ints_SI.stride(0),
        record_CW.stride(0),
        cells_apart,
        TOKEN=TOKEN,
        POSITION=POSITION,
        LIMIT=LIMIT,
        DONE=DONE,
        FIRST_STOP=FIRST_STOP,
        NUM_STOPS=state.ints_SI.shape[1] - FIRST_STOP,
        BLOCK_R=BLOCK_R,
        num_warps=4,
    )


def end_step_reference(
    token_R: Tensor,
    logprob_R: Tensor,
    sampling_logprob_R: Tensor,
    active_R: Tensor,
    state: RowState,
    cursor_R: Tensor,
    record_CW: Tensor,
    *,
    cells_apart: int,
) -> None:
    """Do what `end_step` does, on any device; `IndexError` on a cell outside the record."""
    _check_shapes(token_R, logprob_R, sampling_logprob_R, active_R, state, cursor_R, record_CW)
    at_L = (state.ints_SI[active_R, DONE] == 0).nonzero()[:, 0]
    rows_L, cells_L = active_R[at_L].long(), cursor_R[at_L].long()
    token_L = token_R[at_L].long()
    if bool((cells_L < 0).any()):
        raise IndexError(f"end_step: cells {cells_L.tolist()} lie outside the record's {record_CW.shape[0]}.")
    record_CW[cells_L, at_L] = token_L.int()
    floats_CW = record_CW.view(torch.float32)
    floats_CW[cells_L + cells_apart, at_L] = logprob_R[at_L].float()
    floats_CW[cells_L + 2 * cells_apart, at_L] = sampling_logprob_R[at_L].float()
    cursor_R[at_L] += 1
    state_LI = state.ints_SI[rows_L]
    position_L = state_LI[:, POSITION] + 1
    ends_L = (position_L + 1 >= state_LI[:, LIMIT]) | (token_L[:, None] == state_LI[:, FIRST_STOP:]).any(1)
    state.ints_SI[rows_L, TOKEN] = token_L
    state.ints_SI[rows_L, POSITION] = position_L
    state.ints_SI[rows_L, DONE] = ends_L.long()


def _check_shapes(
    token_R: Tensor,
    logprob_R: Tensor,
    sampling_logprob_R: Tensor,
    active_R: Tensor,
    state: RowState,
    cursor_R: Tensor,
    record_CW: Tensor,
) -> None:
    state.check("end_step")
    num_rows = active_R.shape[0]
    named = (
        ("token", token_R),
        ("logprob", logprob_R),
        ("sampling_logprob", sampling_logprob_R),
        ("active", active_R),
        ("cursor", cursor_R),
    )
    for name, tensor in named:
        shape = tuple(tensor.shape)
        fits = shape == (num_rows,) and num_rows > 0 and tensor.is_contiguous()
        check(fits, f"end_step: {name} {shape} is not a contiguous [{num_rows}], at least [1].")
    record = tuple(record_CW.shape)
    check(
        len(record) == 2 and record[1] >= num_rows and record_CW.is_contiguous(),
        f"end_step: record {record} is not a contiguous [cells, {num_rows} or more].",
    )
    integers = cursor_R.dtype == torch.int32 == record_CW.dtype
    check(integers, f"end_step: cursor is {cursor_R.dtype}, record {record_CW.dtype}; both are int32.")
