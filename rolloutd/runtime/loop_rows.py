"""The rows of state that decoding sequences have on a device, and what the host sends there before a run.

Columns are written with numpy, no object per token. Shapes: S state rows, R rows of a run, M blocks of a table.
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
        self.appended = transfers.host_buffer((num_appended,), torch.int64)
        self.appended_at = transfers.host_buffer((num_appended,), torch.int64)


class DeviceRows:
    """State and block tables by row. A sequence keeps its row until a run that does not continue another."""

    def __init__(self, sizes: LoopSizes, device: torch.device) -> None:
        self._sizes = sizes
        self.padding_row = sizes.max_num_seqs
        """A row that has always ended."""
        self.state = RowState.allocate(sizes.max_num_seqs + 1, MAX_DEVICE_STOPS, device)
        self.tables_SM = torch.zeros((sizes.max_num_seqs + 1, sizes.max_blocks), dtype=torch.int32, device=device)
        self._row_of: dict[Sequence, int] = {}
        self._num_known: I64 = np.zeros(sizes.max_num_seqs, np.int64)
        """Blocks of each row's table that are on the device."""

    def send(self, run: Batch, staging: Staging) -> Tensor:
        """Bring the rows up to date and return their numbers [R], in host memory of `staging`."""
        chunks = run.chunks
        num_blocks = table_lengths(chunks)
        if not run.continues:
            self._row_of = {chunk.sequence: row for row, chunk in enumerate(chunks)}
        rows = np.fromiter((self._row_of[chunk.sequence] for chunk in chunks), np.int64, len(chunks))
        if run.continues:
            self._send_appended(chunks, rows, staging)
        else:
            self._send_all(chunks, num_blocks, staging)
        self._num_known[rows] = num_blocks
        rows_R = staging.rows_S[: len(chunks)]
        rows_R.numpy()[:] = rows
        return rows_R

    def _send_all(self, chunks: Many[Chunk], num_blocks: I64, staging: Staging) -> None:
        n, width = len(chunks), int(num_blocks.max())
        ints_RI, floats_RF = staging.ints_SI[:n], staging.floats_SF[:n]
        tables_RM = staging.tables[: n * width].view(n, width)
        _write_state(chunks, self._sizes, ints_RI.numpy(), floats_RF.numpy())
        _write_tables(chunks, num_blocks, tables_RM.numpy())
        self.state.ints_SI[:n].copy_(ints_RI, non_blocking=True)
        self.state.floats_SF[:n].copy_(floats_RF, non_blocking=True)
        self.tables_SM[:n, :width].copy_(tables_RM, non_blocking=True)

    def _send_appended(self, chunks: Many[Chunk], rows: I64, staging: Staging) -> None:
        at: list[int] = []
        blocks: list[int] = []
        for chunk, row, known in zip(chunks, rows.tolist(), self._num_known[rows].tolist(), strict=True):
            table = chunk.sequence.block_table
            if len(table) > known:
                blocks += table[known:]
                first = row * self._sizes.max_blocks
                at += range(first + known, first + len(table))
        n, device = len(at), self.tables_SM.device
        if n == 0:
            return
        assert n <= len(staging.appended), "tables grew by more than a run may write"
        staging.appended.numpy()[:n] = blocks
        staging.appended_at.numpy()[:n] = at
        new = staging.appended[:n].to(device, non_blocking=True).int()
        self.tables_SM.view(-1).index_copy_(0, staging.appended_at[:n].to(device, non_blocking=True), new)


def table_lengths(chunks: Many[Chunk]) -> I64:
    """Return the number of blocks of each chunk's sequence."""
    return np.fromiter((len(chunk.sequence.block_table) for chunk in chunks), np.int64, len(chunks))


def truncates(chunk: Chunk) -> bool:
    """Return whether a draw of the chunk's sequence needs more than a temperature."""
    params = chunk.sequence.group.params
    return params.truncates and params.temperature > 0.0


def _write_state(chunks: Many[Chunk], sizes: LoopSizes, ints_RI: I64, floats_RF: F32) -> None:
    """Write the state of rows whose next token each chunk names."""
    groups = [chunk.sequence.group for chunk in chunks]
    cut = [group.params if truncates(chunk) else None for chunk, group in zip(chunks, groups, strict=True)]
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


def _write_tables(chunks: Many[Chunk], num_blocks: I64, tables_RM: I32) -> None:
    """Write block tables, padded with block 0."""
    flat = chain.from_iterable(chunk.sequence.block_table for chunk in chunks)
    tables_RM[:] = 0
    tables_RM[np.arange(tables_RM.shape[1]) < num_blocks[:, None]] = np.fromiter(flat, np.int32, int(num_blocks.sum()))
