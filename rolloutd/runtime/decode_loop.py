"""Several decode steps in a row without the host: the state of the sequences that decode lies on the device.

A run names the rows of state that take part (`loop_rows.py`). Each of its steps gathers what the model reads, computes,
draws, records and advances (kernels/begin_step.py, kernels/end_step.py). The tensors of a step never move, so that it
can be captured: sizes come in buckets, and padding is a row that has ended. Rows that end on the way go on as such:
they attend to nothing, and store their keys and values in a block that no sequence has.

Shapes: R rows of a bucket, M blocks of a table, W columns of the record, C cells of one run, K steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rolloutd.engine.sequence import Batch, SampledRun
from rolloutd.kernels.begin_step import StepRows, begin_step, begin_step_reference
from rolloutd.kernels.end_step import end_step, end_step_reference
from rolloutd.kernels.prefix_attention import ITEM_ROWS

from .inputs import ForwardInputs, SharedRows
from .loop_rows import I32, DeviceRows, LoopSizes, Staging
from .sampler import DrawTokens
from .shared_prefix import SharedPrefixes
from .step_graphs import Step, StepGraphs
from .transfers import Event, Transfers, wait

SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BUCKET_STEP = 128
"""Above the small ones. Below 256 rows a product costs little more than its weights: padding is nearly free there."""
MIN_WIDTH = 64
"""Blocks of the narrowest tables that a step is computed with; wider ones double."""
NUM_LANES = 2
"""Runs that may be launched and not yet read."""
DEADLINE_S = 60.0
"""For the answer to a run: a thousand times what it takes."""

Forward = Callable[[ForwardInputs], Tensor]
"""Writes keys and values of decode rows, and returns what `draw` takes first: one row each."""


def bucket_for(num_rows: int) -> int:
    """Return the number of rows that a step of `num_rows` computes."""
    for bucket in SMALL_BUCKETS:
        if num_rows <= bucket:
            return bucket
    return -(-num_rows // BUCKET_STEP) * BUCKET_STEP


class _Lane:
    """Memory of one run: what it is told, its part of the record, and where that arrives."""

    def __init__(self, number: int, sizes: LoopSizes, record_CW: Tensor, transfers: Transfers) -> None:
        self.staging = Staging(sizes, transfers)
        num_cells = 3 * sizes.max_steps + 1
        self.first_cell = number * num_cells
        self.record_CW = record_CW[self.first_cell : self.first_cell + num_cells]
        self.arrived_CW = transfers.host_buffer(self.record_CW.shape, torch.int32)
        self._event: Event | None = None
        self._handle: weakref.ref[RunHandle] | None = None

    def begin(self) -> None:
        """See to it that nobody needs the memory: neither the device, nor a reader of the last answer."""
        handle = self._handle() if self._handle is not None else None
        assert handle is None or handle.is_read, f"{NUM_LANES} runs are launched, and the first was not read"
        if self._event is not None:
            wait(self._event, DEADLINE_S, "a run of decode steps")

    def end(self, event: Event, num_rows: int) -> RunHandle:
        """Return the handle of the run that was launched here; `event` is the arrival of its record."""
        handle = RunHandle(self, event, num_rows)
        self._event, self._handle = event, weakref.ref(handle)
        return handle


class RunHandle:
    """A run on its way."""

    def __init__(self, lane: _Lane, event: Event, num_rows: int) -> None:
        self._lane = lane
        self._event = event
        self._num_rows = num_rows
        self._answer: SampledRun | None = None

    @property
    def is_read(self) -> bool:
        return self._answer is not None

    def result(self) -> SampledRun:
        """Return the answer once it is there; `EngineStalled` after `DEADLINE_S`."""
        if self._answer is None:
            wait(self._event, DEADLINE_S, "a run of decode steps")
            cells_CR: I32 = self._lane.arrived_CW.numpy()[:, : self._num_rows]
            self._answer = _read(cells_CR, self._lane.first_cell)
        return self._answer


def _read(cells_CR: I32, first_cell: int) -> SampledRun:
    """Return the tokens and log-probabilities of each column; the last cell says where it ended."""
    steps = len(cells_CR) // 3
    counts = (cells_CR[-1] - first_cell).tolist()
    used = max(counts)
    floats_CR = cells_CR[:-1].view(np.float32)

    def columns(first: int, cells: np.ndarray) -> list[list[Any]]:
        lists: list[list[Any]] = cells[first : first + used].T.tolist()
        return [values if count == used else values[:count] for values, count in zip(lists, counts, strict=True)]

    return SampledRun(columns(0, cells_CR), columns(steps, floats_CR), columns(2 * steps, floats_CR))


class DecodeLoop:
    """Runs of decode steps for at most `max_num_seqs` sequences."""

    def __init__(
        self,
        forward: Forward,
        draw: DrawTokens,
        sizes: LoopSizes,
        device: torch.device,
        transfers: Transfers,
        graphs: StepGraphs,
        prefixes: SharedPrefixes | None = None,
    ) -> None:
        self._forward = forward
        self._draw = draw
        self._sizes = sizes
        self._graphs = graphs
        self._transfers = transfers
        compiled = device.type == "cuda"
        self._begin = begin_step if compiled else begin_step_reference
        self._end = end_step if compiled else end_step_reference
        self._rows = DeviceRows(sizes, device, prefixes)
        width = bucket_for(sizes.max_num_seqs)
        self._active_R = torch.zeros(width, dtype=torch.int64, device=device)
        self._tables = torch.zeros(width * sizes.max_blocks, dtype=torch.int32, device=device)
        """Of the active rows, [R, M] for the R and M of a run."""
        self._step_rows = StepRows.allocate(width, device)
        self._prefix_lens_R = torch.zeros(width, dtype=torch.int32, device=device)
        self._item_rows_IW = torch.zeros((max(1, width // 2), ITEM_ROWS), dtype=torch.int32, device=device)
        self._cursor_R = torch.zeros(width, dtype=torch.int32, device=device)
        num_cells = NUM_LANES * (3 * sizes.max_steps + 1)
        record_CW = self._record_CW = torch.zeros((num_cells, width), dtype=torch.int32, device=device)
        self._lanes = [_Lane(i, sizes, record_CW, transfers) for i in range(NUM_LANES)]

    @torch.inference_mode()
    def launch(self, run: Batch) -> RunHandle:
        """Start a run and return at once. The answer to the run before the last one was read, or its handle dropped."""
        lane = self._lanes[0]
        lane.begin()
        assert run.num_steps <= self._sizes.max_steps, "a run is longer than its record"
        self._lanes.append(self._lanes.pop(0))
        sent = self._rows.send(run, lane.staging)
        num_rows = len(run.chunks)
        bucket, width = bucket_for(num_rows), self._width_for(sent.max_blocks)
        step = self._step(bucket, width, sent.truncated, is_shared=sent.shared is not None)
        active_R = self._active_R[:bucket]
        active_R[:num_rows].copy_(sent.rows_R, non_blocking=True)
        tables_RM = self._tables[: bucket * width].view(bucket, width)
        torch.index_select(self._rows.tables_SM[:, :width], 0, active_R, out=tables_RM)
        if sent.shared is not None:
            self._prefix_lens_R[:num_rows].copy_(sent.shared.prefix_lens_R, non_blocking=True)
            self._item_rows_IW[: len(sent.shared.item_rows_IW)].copy_(sent.shared.item_rows_IW, non_blocking=True)
        self._cursor_R.fill_(lane.first_cell)
        for _ in range(run.num_steps):
            step()
        lane.record_CW[-1].copy_(self._cursor_R)
        return lane.end(self._transfers.fetch(lane.record_CW, lane.arrived_CW), num_rows)

    def _width_for(self, num_blocks: int) -> int:
        width = MIN_WIDTH
        while width < num_blocks:
            width *= 2
        return min(width, self._sizes.max_blocks)

    def _step(self, bucket: int, width: int, truncated: bool, *, is_shared: bool) -> Step:
        """Return what computes one step of the active rows, all of which are padding when this returns."""
        shared = None
        if is_shared:
            self._prefix_lens_R.zero_()
            self._item_rows_IW.fill_(-1)
            items = max(1, bucket // 2)  # each has two rows or more
            shared = SharedRows(self._prefix_lens_R[:bucket], self._item_rows_IW[:items])
        self._active_R.fill_(self._rows.padding_row)  # a capture runs the step: on rows that have ended, to no effect
        active_R = self._active_R[:bucket]
        rows = self._step_rows.first(bucket)
        tables_RM = self._tables[: bucket * width].view(bucket, width)
        cursor_R = self._cursor_R[:bucket]
        block_size, steps = self._sizes.block_size, self._sizes.max_steps
        scratch_slot = self._sizes.scratch_block * block_size
        inputs = ForwardInputs(
            token_ids_T=rows.token_id_R,
            positions_T=rows.position_R,
            slot_mapping_T=rows.slot_R,
            num_decode=bucket,
            decode_block_tables_RM=tables_RM,
            decode_lens_R=rows.len_R,
            prefills=(),
            last_row_of_chunk=np.arange(bucket),
            shared=shared,
        )
        draw = self._draw_of(rows, truncated)

        def step() -> None:
            state = self._rows.state
            self._begin(active_R, state, tables_RM, rows, block_size=block_size, scratch_slot=scratch_slot)
            drawn = draw(self._forward(inputs))
            self._end(*drawn, active_R, state, cursor_R, self._record_CW, cells_apart=steps)

        return self._graphs.replay_of((bucket, width, truncated, is_shared), step)

    def _draw_of(self, rows: StepRows, truncated: bool) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        cuts = {"top_k_R": rows.top_k_R, "top_p_R": rows.top_p_R, "min_p_R": rows.min_p_R} if truncated else {}
        keys = rows.temperature_R, rows.seed_R, rows.index_R, rows.draw_position_R
        return lambda logits_RV: self._draw(logits_RV, *keys, **cuts)
