"""prefix_attention as a kernel, against float64 and against the flat kernel; slots that are no row's are NaN."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rolloutd.kernels.decode_attention import decode_attention
from rolloutd.kernels.prefix_attention import ITEM_ROWS, prefix_attention, prefix_attention_reference
from tests.kernels.paged import NAN, PagedRows

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Groups:
    """Rows over one pool, those of a group with the same blocks at their beginning, and the work list."""

    paged: PagedRows
    prefix_lens: Tensor
    items: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        paged = self.paged
        return paged.keys, paged.values, paged.tables, paged.lens, self.prefix_lens, self.items


def grouped_rows(
    groups: list[tuple[int, list[int]]],
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Groups:
    """Return groups of (blocks that are shared, length of each row); a row of length 0 has ended."""
    prefixes = [blocks * block_size for blocks, lens in groups for _ in lens]
    lens = [length for _, many in groups for length in many]
    own = [max(0, -(-(length - prefix) // block_size)) for length, prefix in zip(lens, prefixes, strict=True)]
    num_blocks = sum(blocks for blocks, _ in groups) + sum(own) + 1
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    keys, values = (torch.full(shape, NAN, dtype=dtype) for _ in range(2))
    order = torch.randperm(num_blocks, generator=generator).tolist()
    width = max(prefix // block_size + n for prefix, n in zip(prefixes, own, strict=True)) + 1
    tables = torch.full((len(lens), width), order.pop(), dtype=torch.int32)

    def fill(block: int, filled: int) -> None:
        for cache in (keys, values):
            cache[block, :filled] = torch.randn(filled, num_kv_heads, head_dim, generator=generator).to(dtype)

    row, items = 0, [[-1] * ITEM_ROWS]  # one that is not used, in front
    for blocks, many in groups:
        shared = [order.pop() for _ in range(blocks)]
        for block in shared:
            fill(block, block_size)
        members = list(range(row, row + len(many)))
        for at in range(0, len(members), ITEM_ROWS) if blocks else ():
            some = members[at : at + ITEM_ROWS]
            items.append(some + [-1] * (ITEM_ROWS - len(some)))
        for length in many:
            tables[row, :blocks] = torch.tensor(shared, dtype=torch.int32)
            for i in range(own[row]):
                tables[row, blocks + i] = block = order.pop()
                fill(block, min(block_size, length - (blocks + i) * block_size))
            row += 1
    paged = PagedRows(
        keys.to(device), values.to(device), tables.to(device), torch.tensor(lens, dtype=torch.int32).to(device)
    )
    lists = (torch.tensor(prefixes, dtype=torch.int32), torch.tensor(items, dtype=torch.int32))
    return Groups(paged, *(tensor.to(device) for tensor in lists))


def queries(groups: Groups, heads: int, generator: torch.Generator) -> Tensor:
    keys = groups.paged.keys
    return torch.randn(len(groups.paged.lens), heads, keys.shape[3], generator=generator).to(keys.dtype).to(keys.device)


def in_float64(q: Tensor, groups: Groups, **options: Any) -> Tensor:
    keys, values, *lists = groups.arguments()
    return prefix_attention_reference(q.double(), keys.double(), values.double(), *lists, **options)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(4, 2, 64, 16), (7, 1, 16, 5), (3, 3, 80, 16), (12, 2, 96, 7), (8, 1, 128, 16), (2, 2, 256, 3)],
)
def test_groups_of_all_sizes(
    device: torch.device,
    generator: torch.Generator,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
) -> None:
    b = block_size
    groups = grouped_rows(
        [(2, [2 * b + 1, 3 * b, 0]), (0, [5, 0, 2 * b]), (1, [b + 1] * 9), (300 // b, [300 + b, 301 + b])],
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
        generator=generator,
    )
    q = queries(groups, heads, generator)
    scale = head_dim**-0.5
    out = prefix_attention(q, *groups.arguments(), scale=scale)
    assert out.dtype == dtype
    assert_close(out, in_float64(q, groups, scale=scale))
    assert (out[2] == 0).all()
    assert (out[4] == 0).all()


PREFIXES = [(16, [65, 70, 64 + 300]), (15, [61, 64]), (17, [69, 0, 600]), (64, [257, 300, 513]), (0, [3, 300, 0])]
"""Blocks of 4: prefixes at and around a split of 64 keys."""


@pytest.fixture
def groups(device: torch.device, generator: torch.Generator) -> Groups:
    return grouped_rows(
        PREFIXES,
        num_kv_heads=2,
        head_dim=16,
        block_size=4,
        dtype=torch.float32,
        device=device,
        generator=generator,
    )


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"scale": 2.0}, {"split_keys": 64}])
def test_it_is_what_flat_attention_is(groups: Groups, generator: torch.Generator, options: dict[str, Any]) -> None:
    options = {"scale": 0.25, **options}
    q, paged = queries(groups, 6, generator), groups.paged
    out = prefix_attention(q, *groups.arguments(), **options)
    flat = decode_attention(q, paged.keys, paged.values, paged.tables, paged.lens, **options)
    torch.testing.assert_close(out, flat, rtol=2e-6, atol=2e-6)
    options.pop("split_keys", None)
    expected = in_float64(q, groups, **options)
    assert (out - expected).abs().max() <= 1.5 * max(1e-6, float((flat - expected).abs().max()))


def test_without_a_prefix_a_row_has_the_bits_of_flat_attention(groups: Groups, generator: torch.Generator) -> None:
    q, paged = queries(groups, 6, generator), groups.paged
    nothing = (torch.zeros_like(groups.prefix_lens), torch.full_like(groups.items, -1))
    out = prefix_attention(q, paged.keys, paged.values, paged.tables, paged.lens, *nothing, scale=0.25)
    assert torch.equal(out, decode_attention(q, paged.keys, paged.values, paged.tables, paged.lens, scale=0.25))


def test_blocks_and_the_order_of_items_do_not_matter(groups: Groups, generator: torch.Generator) -> None:
    q = queries(groups, 6, generator)
    out = prefix_attention(q, *groups.arguments(), scale=0.25)
    moved = Groups(groups.paged.permuted(generator), groups.prefix_lens, groups.items.flip(0).contiguous())
    assert torch.equal(prefix_attention(q, *moved.arguments(), scale=0.25), out)


def test_a_prefix_is_read_by_its_items_first_row_alone(groups: Groups, generator: torch.Generator) -> None:
    """The other members' tables may hold anything there: their programs do not look."""
    q = queries(groups, 6, generator)
    out = prefix_attention(q, *groups.arguments(), scale=0.25)
    row = 1  # of the first group, whose prefix is 16 blocks
    groups.paged.tables[row, :16] = 0
    groups.paged.keys[0], groups.paged.values[0] = NAN, NAN
    again = prefix_attention(q, *groups.arguments(), scale=0.25)
    assert torch.equal(again[row], out[row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lens, items: items[1].fill_(-1), "items hold rows"),
        (lambda lens, items: lens[1].fill_(60), "row 1 does not fit item"),
        (lambda lens, items: items[1].copy_(items[1].flip(0)), "do not stand at its beginning"),
    ],
)
def test_the_reference_refuses_lists_that_contradict_themselves(groups: Groups, change: Any, message: str) -> None:
    change(groups.prefix_lens, groups.items)
    q = torch.zeros(len(groups.paged.lens), 6, 16, device=groups.items.device)
    with pytest.raises(ValueError, match=re.escape(message)):
        prefix_attention_reference(q, *groups.arguments(), scale=1.0)


def test_lists_that_do_not_fit_are_refused(groups: Groups) -> None:
    q = torch.zeros(len(groups.paged.lens), 6, 16, device=groups.items.device)
    keys, values, tables, lens, prefixes, items = groups.arguments()
    with pytest.raises(ValueError, match=r"prefix_lens .* is not"):
        prefix_attention(q, keys, values, tables, lens, prefixes[1:], items, scale=1.0)
    with pytest.raises(ValueError, match=r"items \(\d, 7\) are not"):
        prefix_attention(q, keys, values, tables, lens, prefixes, items[:, 1:], scale=1.0)
    with pytest.raises(ValueError, match="item_rows is torch"):
        prefix_attention(q, keys, values, tables, lens, prefixes, items.long(), scale=1.0)
