"""The rows of state that decoding sequences have on a device, and what the host sends there before a run.

Columns are written with numpy, no object per token. Shapes: S state rows, R rows of a run, M blocks of a table, A
blocks by which tables grew.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rolloutd.engine.sequence import MAX_DEVICE_STOPS, Batch, Chunk, Sequence
from rolloutd.kernels.prefix_attention import ITEM_ROWS
from rolloutd.kernels.row_state import (
    DONE,
    FIRST_STOP,
    INDEX,
    LIMIT,
    MIN_P,
    POSITION,
    SEED,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    TOP_P,
    RowState,
)

from .inputs import SharedRows
from .shared_prefix import SharedPrefixes
from .transfers import Transfers

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class LoopSizes:
    """What never changes while the KV cache lives."""

    max_num_seqs: int
    max_model_len: int
    max_steps: int
    block_size: int
    scratch_block: int
    """A block that no sequence has."""
    vocab_size: int

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)


class Staging:
    """Host memory for what one run is told; written again only once the run has ended."""

    def __init__(self, sizes: LoopSizes, transfers: Transfers) -> None:
        rows = sizes.max_num_seqs
        num_appended = rows * (sizes.max_steps // sizes.block_size + 2)
        self.ints_SI = transfers.host_buffer((rows, FIRST_STOP + MAX_DEVICE_STOPS), torch.int64)
        self.floats_SF = transfers.host_buffer((rows, MIN_P + 1), torch.float32)
        self.tables = transfers.host_buffer((rows * sizes.max_blocks,), torch.int32)
        self.rows_S = transfers.host_buffer((rows,), torch.int64)
        self.appended = transfers.host_buffer((num_appended,), torch.int32)
        self.appended_at = transfers.host_buffer((num_appended,), torch.int64)
        self.prefix_lens_S = transfers.host_buffer((rows,), torch.int32)
        self.item_rows = transfers.host_buffer((rows // 2 * ITEM_ROWS,), torch.int32)


@dataclass(frozen=True)
class SentRows:
    """The rows of a run, and what they ask of its steps."""

    rows_R: Tensor
    """Their numbers, in host memory."""
    max_blocks: int
    """Of the longest table."""
    truncated: bool
    """Some draws need more than a temperature."""
    shared: SharedRows | None
    """What rows share, by their place in the run, in host memory; None where they are attended to one by one."""


class DeviceRows:
    """State and block tables by row. A sequence keeps its row until a run that does not continue another."""

    def __init__(self, sizes: LoopSizes, device: torch.device, prefixes: SharedPrefixes | None) -> None:
        self._sizes = sizes
        self._prefixes = prefixes
        self.padding_row = sizes.max_num_seqs
        """A row that has always ended."""
        self.state = RowState.allocate(sizes.max_num_seqs + 1, MAX_DEVICE_STOPS, device)
        self.tables_SM = torch.zeros((sizes.max_num_seqs + 1, sizes.max_blocks), dtype=torch.int32, device=device)
        self._row_of: dict[Sequence, int] = {}
        self._num_known: I64 = np.zeros(sizes.max_num_seqs, np.int64)
        """Blocks of each row's table that are on the device."""
        self._truncates = np.zeros(sizes.max_num_seqs, np.bool_)

    def send(self, run: Batch, staging: Staging) -> SentRows:
        """Bring the rows up to date and return which they are."""
        chunks = run.chunks
        tables = [chunk.sequence.block_table for chunk in chunks]
        num_blocks = np.fromiter(map(len, tables), np.int64, len(tables))
        if run.continues:
            row_of = self._row_of
            rows = np.fromiter([row_of[chunk.sequence] for chunk in chunks], np.int64, len(chunks))
            self._send_appended(tables, num_blocks, rows, staging)
        else:
            self._row_of = {chunk.sequence: row for row, chunk in enumerate(chunks)}
            rows = np.arange(len(chunks))
            self._truncates[rows] = [_truncates(chunk) for chunk in chunks]
            self._send_all(chunks, tables, num_blocks, staging)
            if self._prefixes is not None:
                self._prefixes.begin(chunks)
        self._num_known[rows] = num_blocks
        rows_R = staging.rows_S[: len(chunks)]
        rows_R.numpy()[:] = rows
        return SentRows(rows_R, int(num_blocks.max()), bool(self._truncates[rows].any()), self._shared(rows, staging))

    def _shared(self, rows: I64, staging: Staging) -> SharedRows | None:
        work = None if self._prefixes is None else self._prefixes.work_list(rows)
        if work is None:
            return None
        prefix_lens_R = staging.prefix_lens_S[: len(rows)]
        item_rows_IW = staging.item_rows[: work.item_rows_IW.size].view(work.item_rows_IW.shape)
        prefix_lens_R.numpy()[:] = work.prefix_lens_R
        item_rows_IW.numpy()[:] = work.item_rows_IW
        return SharedRows(prefix_lens_R, item_rows_IW)

    def _send_all(self, chunks: Many[Chunk], tables: list[list[int]], num_blocks: I64, staging: Staging) -> None:
        n, width = len(chunks), int(num_blocks.max())
        ints_RI, floats_RF = staging.ints_SI[:n], staging.floats_SF[:n]
        tables_RM = staging.tables[: n * width].view(n, width)
        _write_state(chunks, self._sizes, ints_RI.numpy(), floats_RF.numpy())
        table_cells: I32 = tables_RM.numpy()
        table_cells[:] = 0
        flat = np.fromiter(chain.from_iterable(tables), np.int32, int(num_blocks.sum()))
        table_cells[np.arange(width) < num_blocks[:, None]] = flat
        self.state.ints_SI[:n].copy_(ints_RI, non_blocking=True)
        self.state.floats_SF[:n].copy_(floats_RF, non_blocking=True)
        self.tables_SM[:n, :width].copy_(tables_RM, non_blocking=True)

    def _send_appended(self, tables: list[list[int]], num_blocks: I64, rows: I64, staging: Staging) -> None:
        known = self._num_known[rows]
        grown = np.flatnonzero(num_blocks > known)
        if not len(grown):
            return
        at: list[int] = []
        blocks: list[int] = []
        for i, row, first in zip(grown.tolist(), rows[grown].tolist(), known[grown].tolist(), strict=True):
            new = tables[i][first:]
            blocks += new
            cell = row * self._sizes.max_blocks + first
            at += range(cell, cell + len(new))
        n, device = len(at), self.tables_SM.device
        assert n <= len(staging.appended), "tables grew by more than a run may write"
        staging.appended.numpy()[:n] = blocks
        staging.appended_at.numpy()[:n] = at
        at_A = staging.appended_at[:n].to(device, non_blocking=True)
        blocks_A = staging.appended[:n].to(device, non_blocking=True)
        self.tables_SM.view(-1).index_copy_(0, at_A, blocks_A)


def _truncates(chunk: Chunk) -> bool:
    """Return whether a draw of the chunk's sequence needs more than a temperature."""
    params = chunk.sequence.group.params
    return params.truncates and params.temperature > 0.0


def _write_state(chunks: Many[Chunk], sizes: LoopSizes, ints_RI: I64, floats_RF: F32) -> None:
    """Write the state of rows whose next token each chunk names."""
    groups = [chunk.sequence.group for chunk in chunks]
    cut = [group.params if _truncates(chunk) else None for chunk, group in zip(chunks, groups, strict=True)]
    vocab_size = sizes.vocab_size
    ints_RI[:, TOKEN] = [chunk.sequence.token_ids[chunk.start] for chunk in chunks]
    ints_RI[:, POSITION] = [chunk.start for chunk in chunks]
    limits = [len(group.prompt_token_ids) + group.params.max_tokens for group in groups]
    ints_RI[:, LIMIT] = np.minimum(limits, sizes.max_model_len)
    ints_RI[:, DONE] = 0
    ints_RI[:, SEED] = np.array([group.seed for group in groups], np.uint64).view(np.int64)
    ints_RI[:, INDEX] = [chunk.sequence.index for chunk in chunks]
    ints_RI[:, TOP_K] = [min(p.top_k, vocab_size) or vocab_size if p else vocab_size for p in cut]
    floats_RF[:, TEMPERATURE] = [group.params.temperature for group in groups]
    floats_RF[:, TOP_P] = [p.top_p if p else 1.0 for p in cut]
    floats_RF[:, MIN_P] = [p.min_p if p else 0.0 for p in cut]
    ints_RI[:, FIRST_STOP:] = -1
    for row, group in enumerate(groups):
        stops = group.stop_token_ids
        assert len(stops) <= MAX_DEVICE_STOPS, "a sequence with more stop ids needs the host at each step"
        ints_RI[row, FIRST_STOP : FIRST_STOP + len(stops)] = tuple(stops)
