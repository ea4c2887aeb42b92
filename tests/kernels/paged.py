"""Paged caches for kernel cases: every slot that holds no token of a row is poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NAN = float("nan")


@dataclass(frozen=True)
class PagedRows:
    """Rows of different lengths over one pool, in blocks of random order."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    lens: Tensor

    def permuted(self, generator: torch.Generator) -> PagedRows:
        """Return the same rows in other blocks."""
        order = torch.randperm(self.keys.shape[0], generator=generator).to(self.keys.device)
        keys, values = torch.empty_like(self.keys), torch.empty_like(self.values)
        keys[order], values[order] = self.keys, self.values
        return PagedRows(keys, values, order[self.tables.long()].to(self.tables.dtype), self.lens)


def paged_rows(
    lens: list[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    index_dtype: torch.dtype = torch.int32,
    spare_blocks: int = 1,
) -> PagedRows:
    """Return rows of these lengths; table entries beyond a row's last block name a poisoned block."""
    needed = [-(-length // block_size) for length in lens]
    num_blocks = sum(needed) + spare_blocks
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    keys, values = (torch.full(shape, NAN, dtype=dtype) for _ in range(2))
    order = torch.randperm(num_blocks, generator=generator).tolist()
    poisoned = order.pop()
    tables = torch.full((len(lens), max(needed, default=0) + 1), poisoned, dtype=index_dtype)
    for row, length in enumerate(lens):
        for i in range(needed[row]):
            block = order.pop()
            tables[row, i] = block
            filled = min(block_size, length - i * block_size)
            for cache in (keys, values):
                cache[block, :filled] = torch.randn(filled, num_kv_heads, head_dim, generator=generator).to(dtype)
    lengths = torch.tensor(lens, dtype=index_dtype)
    return PagedRows(keys.to(device), values.to(device), tables.to(device), lengths.to(device))
