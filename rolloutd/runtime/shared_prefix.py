"""Which rows of a run begin with the same blocks, and whether attention should read those once: decided on the host.

A group's samples share the blocks of its prompt, unless one was preempted and computed its own. Shapes: R rows of a
run, S state rows, I items of W rows (kernels/prefix_attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rolloutd.engine.sequence import Chunk, Sequence
from rolloutd.kernels.prefix_attention import ITEM_ROWS

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

MIN_SAVED_BYTES = 15e6
"""Of a layer and step, for shared reads to pay (estimated): a work list's programs and a wider tile cost about 4 us, in
which an H200 reads 17 MB."""
MIN_TOKENS = 256
"""Of a prefix, for its group to take part: of 128 tokens FlashInfer's kernel lost half its speed, at 256 it won
(measured by others on an L20)."""


@dataclass(frozen=True)
class SharingRule:
    """When rows of a group are attended together."""

    min_tokens: int
    min_saved_bytes: float

    @classmethod
    def of(cls, option: str, block_size: int) -> SharingRule | None:
        """Return the rule of an option: `auto`, or `on` wherever two rows share a block; None where it is off."""
        if option == "off":
            return None
        return cls(MIN_TOKENS, MIN_SAVED_BYTES) if option == "auto" else cls(block_size, 0.0)


@dataclass(frozen=True)
class WorkList:
    """The items of a run, and the tokens that each row shares."""

    item_rows_IW: I32
    prefix_lens_R: I32


class SharedPrefixes:
    """What state rows share: `begin` learns it from block tables, after which rows only leave."""

    def __init__(self, rule: SharingRule, num_rows: int, block_size: int, kv_bytes_per_token: int) -> None:
        """`kv_bytes_per_token` is that of one layer."""
        self._rule = rule
        self._block_size = block_size
        self._kv_bytes = kv_bytes_per_token
        self._share_S: I64 = np.zeros(num_rows, np.int64)
        """Number of the rows that a row shares with; 0 for none."""
        self._tokens_S: I64 = np.zeros(num_rows, np.int64)

    def begin(self, chunks: Many[Chunk]) -> None:
        """Compare the block tables of state rows 0, 1, …, those of `chunks`."""
        self._share_S[:] = 0
        by_group: dict[int, list[tuple[int, Sequence]]] = {}
        for row, chunk in enumerate(chunks):
            by_group.setdefault(id(chunk.sequence.group), []).append((row, chunk.sequence))
        number = 0
        for members in by_group.values():
            num_blocks = len(members[0][1].group.prompt_token_ids) // self._block_size
            while len(members) > 1 and num_blocks * self._block_size >= self._rule.min_tokens:
                number += 1
                members = self._share(number, members, num_blocks)

    def _share(self, number: int, members: list[tuple[int, Sequence]], num_blocks: int) -> list[tuple[int, Sequence]]:
        """Let those share who begin as the first does, and return the others.

        A sample that was seated late may have a last block of its own: it computed the prompt's last token again.
        """
        prefix = members[0][1].block_table[: num_blocks - 1]
        alike = [(row, sequence) for row, sequence in members if sequence.block_table[: num_blocks - 1] == prefix]
        last = {sequence.block_table[num_blocks - 1] for _, sequence in alike}
        num_shared = num_blocks if len(last) == 1 else num_blocks - 1
        if num_shared * self._block_size >= self._rule.min_tokens:
            rows = [row for row, _ in alike]
            self._share_S[rows] = number
            self._tokens_S[rows] = num_shared * self._block_size
        found = {row for row, _ in alike}
        return [(row, sequence) for row, sequence in members if row not in found]

    def work_list(self, rows_R: I64) -> WorkList | None:
        """Return the items of the rows that take part, by their place in the run; None where sharing does not pay."""
        share_R = self._share_S[rows_R]
        order = np.argsort(share_R, kind="stable")
        order = order[np.searchsorted(share_R[order], 1) :]
        _, number, counts = np.unique(share_R[order], return_inverse=True, return_counts=True)
        is_shared = counts[number] > 1
        order, number = order[is_shared], number[is_shared]  # the last one of a group shares with nobody
        num_items = np.where(counts > 1, -(-counts // ITEM_ROWS), 0)
        firsts = np.searchsorted(number, np.arange(len(counts)))
        tokens = self._tokens_S[rows_R[order]]
        count, parts = counts[number], num_items[number]
        saved_bytes = float((tokens * (1 - parts / count)).sum()) * self._kv_bytes  # a group is read once per item
        if not len(order) or saved_bytes < self._rule.min_saved_bytes:
            return None
        place = np.arange(len(order)) - firsts[number]
        part = place * parts // count  # items of one group are of equal size, give or take one
        item = (np.cumsum(num_items) - num_items)[number] + part
        items = np.full((int(num_items.sum()), ITEM_ROWS), -1, np.int32)
        items[item, place + -part * count // parts] = order
        prefix_lens = np.zeros(len(rows_R), np.int32)
        prefix_lens[order] = tokens
        return WorkList(items, prefix_lens)
