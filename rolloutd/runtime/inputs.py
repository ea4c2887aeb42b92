"""A Batch as device tensors.

Rows of one token (decode) come first and are attended together; longer chunks (prefill) one by one after them.
Names: T = tokens of this step, R = decode rows, M = blocks of the longest decode row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rolloutd.engine.sequence import Batch, Chunk

ROW_MULTIPLE = 4
"""Rows are padded to this: fp32 matrix products on CPUs keep a row's bits for every multiple of 4 (MKL, AVX2)."""


@dataclass(frozen=True)
class PrefillRows:
    """Rows `row : row + length` are tokens `start : start + length` of one sequence with blocks `block_table_M`."""

    row: int
    start: int
    length: int
    block_table_M: Tensor


@dataclass(frozen=True)
class PackedPrefills:
    """All prefilling chunks as one call takes them, S chunks; their rows follow those that decode."""

    block_tables_SM: Tensor
    starts_S1: Tensor
    """Row of each chunk's first token, counted from the first of all; the last entry is the number of rows."""
    lens_S: Tensor
    """Tokens up to each chunk's end."""
    longest: int
    num_rows: int


@dataclass(frozen=True)
class SharedRows:
    """Decode rows that begin with the same blocks, as `prefix_attention` takes them."""

    prefix_lens_R: Tensor
    item_rows_IW: Tensor


@dataclass(frozen=True)
class LastRows:
    """The last row of each chunk, as decode rows of their own: all of a last layer that draws depend on."""

    rows_R: Tensor
    """Which rows of the step they are; padding repeats the first."""
    inputs: ForwardInputs


@dataclass(frozen=True)
class ForwardInputs:
    """What one forward pass reads. Padding rows repeat token 0 at position 0 and are stored nowhere."""

    token_ids_T: Tensor
    positions_T: Tensor
    slot_mapping_T: Tensor
    """Slot of each real row, block x block_size + offset; shorter than T by the padding."""
    num_decode: int
    decode_block_tables_RM: Tensor
    decode_lens_R: Tensor
    """Tokens that each decode row attends to, itself included."""
    prefills: tuple[PrefillRows, ...]
    last_row_of_chunk: np.ndarray
    """Row of each chunk's last token, in the batch's order."""
    shared: SharedRows | None = None
    """Where it pays to read a prefix once for several decode rows; what is computed is the same."""
    last_only: bool = False
    """There is more than the last row of each chunk, and nobody reads the output of more."""

    @property
    def output_row_of_chunk(self) -> np.ndarray:
        """Row of the forward's output for each chunk's last token, in the batch's order."""
        return (self if self.last_rows is None else self.last_rows.inputs).last_row_of_chunk

    @cached_property
    def last_rows(self) -> LastRows | None:
        """The rows of the output, put together once; None where these are all rows of the step."""
        packed = self.packed_prefills if self.last_only else None
        if packed is None:
            return None
        rows = np.sort(self.last_row_of_chunk)
        padding = -len(rows) % ROW_MULTIPLE
        rows_R = torch.from_numpy(np.append(rows, np.full(padding, rows[0]))).to(self.token_ids_T.device)
        tables = self.decode_block_tables_RM, packed.block_tables_SM
        width = max(table.shape[1] for table in tables)
        tables_RM = torch.cat([F.pad(table, (0, width - table.shape[1])) for table in tables])
        inputs = ForwardInputs(
            token_ids_T=self.token_ids_T[rows_R],
            positions_T=self.positions_T[rows_R],
            slot_mapping_T=self.slot_mapping_T[rows_R[: len(rows)]],
            num_decode=len(rows_R),
            decode_block_tables_RM=F.pad(tables_RM, (0, 0, 0, padding)),
            decode_lens_R=F.pad(torch.cat((self.decode_lens_R, packed.lens_S)), (0, padding)),
            prefills=(),
            last_row_of_chunk=np.searchsorted(rows, self.last_row_of_chunk),
        )
        return LastRows(rows_R, inputs)

    @cached_property
    def packed_prefills(self) -> PackedPrefills | None:
        """The prefilling chunks in one piece, put together once for all layers; None where there are none."""
        if not self.prefills:
            return None
        device = self.token_ids_T.device
        lengths = [rows.length for rows in self.prefills]
        width = max(rows.block_table_M.shape[0] for rows in self.prefills)
        tables = [F.pad(rows.block_table_M, (0, width - rows.block_table_M.shape[0])) for rows in self.prefills]
        starts = np.cumsum([0, *lengths])
        ends = np.array([rows.start + rows.length for rows in self.prefills])
        return PackedPrefills(
            block_tables_SM=torch.stack(tables),
            starts_S1=torch.from_numpy(starts).to(device),
            lens_S=torch.from_numpy(ends).to(device),
            longest=max(lengths),
            num_rows=int(starts[-1]),
        )


def build_inputs(batch: Batch, block_size: int, device: torch.device) -> ForwardInputs:
    """Return the tensors of a batch with at least one chunk."""
    order = sorted(range(len(batch.chunks)), key=[chunk.length > 1 for chunk in batch.chunks].__getitem__)
    chunks = [batch.chunks[i] for i in order]
    lengths = np.fromiter((chunk.length for chunk in chunks), np.int64, len(chunks))
    ends = np.cumsum(lengths)
    num_decode = int((lengths == 1).sum())
    last_row = np.empty(len(chunks), np.int64)
    last_row[order] = ends - 1
    num_tokens = int(ends[-1])
    num_rows = -(-num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE

    token_ids = np.zeros(num_rows, np.int64)
    positions = np.zeros(num_rows, np.int64)
    slots = np.empty(num_tokens, np.int64)
    starts = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
    decoding = chunks[:num_decode]
    token_ids[:num_decode] = [chunk.sequence.token_ids[chunk.start] for chunk in decoding]
    positions[:num_decode] = starts[:num_decode]
    tables = _pad_tables(decoding)
    index, offset = np.divmod(starts[:num_decode], block_size)
    slots[:num_decode] = tables[np.arange(num_decode), index] * block_size + offset

    prefills = []
    for chunk, end in zip(chunks[num_decode:], ends[num_decode:].tolist(), strict=True):
        rows = slice(end - chunk.length, end)
        token_ids[rows] = chunk.sequence.token_ids[chunk.start : chunk.end]
        positions[rows] = np.arange(chunk.start, chunk.end)
        table = np.asarray(chunk.sequence.block_table, np.int64)
        index, offset = np.divmod(positions[rows], block_size)
        slots[rows] = table[index] * block_size + offset
        prefills.append(PrefillRows(rows.start, chunk.start, chunk.length, torch.from_numpy(table).to(device)))

    return ForwardInputs(
        token_ids_T=torch.from_numpy(token_ids).to(device),
        positions_T=torch.from_numpy(positions).to(device),
        slot_mapping_T=torch.from_numpy(slots).to(device),
        num_decode=num_decode,
        decode_block_tables_RM=torch.from_numpy(tables).to(device),
        decode_lens_R=torch.from_numpy(starts[:num_decode] + 1).to(device),
        prefills=tuple(prefills),
        last_row_of_chunk=last_row,
        last_only=bool(prefills) and not any(chunk.sequence.group.scores_prompt for chunk in chunks),
    )


def _pad_tables(chunks: list[Chunk]) -> np.ndarray:
    """Return the chunks' block tables as one array, short ones padded with block 0 (masked by length)."""
    block_tables = [chunk.sequence.block_table for chunk in chunks]
    lens = np.fromiter(map(len, block_tables), np.int64, len(chunks))
    tables = np.zeros((len(chunks), lens.max(initial=0)), np.int64)
    flat = np.fromiter(chain.from_iterable(block_tables), np.int64, int(lens.sum()))
    tables[np.arange(tables.shape[1]) < lens[:, None]] = flat
    return tables
