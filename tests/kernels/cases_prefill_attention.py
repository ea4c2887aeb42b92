"""prefill_attention as a kernel, against float64 and against decoding; slots that are no row's are NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rolloutd.kernels.decode_attention import decode_attention
from rolloutd.kernels.prefill_attention import prefill_attention, prefill_attention_reference
from tests.kernels.cases_decode_attention import assert_close, queries
from tests.kernels.paged import PagedRows, paged_rows

CHUNKS = [(1, 1), (70, 70), (5, 130), (64, 64), (0, 9), (65, 200)]
"""(queries, tokens in the cache)."""


def chunks(device: torch.device, generator: torch.Generator, **options: Any) -> tuple[PagedRows, Tensor]:
    shape = {"num_kv_heads": 2, "head_dim": 16, "block_size": 4, "dtype": torch.float32, **options}
    paged = paged_rows([length for _, length in CHUNKS], device=device, generator=generator, **shape)
    starts = torch.tensor([0, *(count for count, _ in CHUNKS)]).cumsum(0).to(paged.tables.dtype)
    return paged, starts.to(device)


def attend(q: Tensor, paged: PagedRows, starts: Tensor, **options: Any) -> Tensor:
    longest = max(count for count, _ in CHUNKS)
    return prefill_attention(
        q, paged.keys, paged.values, paged.tables, starts, paged.lens, max_query_len=longest, **options
    )


def in_float64(q: Tensor, paged: PagedRows, starts: Tensor, **options: Any) -> Tensor:
    caches = paged.keys.double(), paged.values.double()
    return prefill_attention_reference(q.double(), *caches, paged.tables, starts, paged.lens, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(4, 2, 64, 16), (3, 1, 80, 5), (2, 2, 96, 16), (1, 1, 128, 16), (1, 1, 256, 16)],
)
def test_chunks_of_all_lengths(
    device: torch.device,
    generator: torch.Generator,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
) -> None:
    paged, starts = chunks(
        device, generator, num_kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    q = queries(int(starts[-1]), heads, head_dim, paged.keys, generator)
    scale = head_dim**-0.5
    assert_close(attend(q, paged, starts, scale=scale), in_float64(q, paged, starts, scale=scale))


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 16}, {"window": 100}, {"softcap": 2.0}, {"softcap": 30.0, "window": 40}]
)
def test_windows_and_caps(device: torch.device, generator: torch.Generator, options: dict[str, Any]) -> None:
    paged, starts = chunks(device, generator)
    q = queries(int(starts[-1]), 6, 16, paged.keys, generator)
    out = attend(q, paged, starts, scale=0.25, **options)
    assert_close(out, in_float64(q, paged, starts, scale=0.25, **options))


def test_other_blocks_and_poisoned_neighbours_change_no_bit(device: torch.device, generator: torch.Generator) -> None:
    paged, starts = chunks(device, generator)
    q = queries(int(starts[-1]), 4, 16, paged.keys, generator)
    out = attend(q, paged, starts, scale=0.25)
    assert torch.equal(attend(q, paged.permuted(generator), starts, scale=0.25), out)
    poisoned = q.clone()
    poisoned[: int(starts[5])] = 1e4
    assert torch.equal(attend(poisoned, paged, starts, scale=0.25)[int(starts[5]) :], out[int(starts[5]) :])


def test_chunked_is_whole_and_one_query_is_a_decoding_row(device: torch.device, generator: torch.Generator) -> None:
    paged = paged_rows(
        [150], num_kv_heads=2, head_dim=16, block_size=4, dtype=torch.float32, device=device, generator=generator
    )
    q = queries(150, 4, 16, paged.keys, generator)

    def part(start: int, stop: int) -> Tensor:
        starts = torch.tensor([0, stop - start], device=device)
        lens = torch.tensor([stop], device=device)
        caches = paged.keys, paged.values
        return prefill_attention(q[start:stop], *caches, paged.tables, starts, lens, max_query_len=150, scale=0.25)

    whole = part(0, 150)
    torch.testing.assert_close(torch.cat([part(0, 7), part(7, 100), part(100, 150)]), whole, rtol=2e-6, atol=2e-6)
    decoded = decode_attention(q[149:], paged.keys, paged.values, paged.tables, paged.lens, scale=0.25)
    torch.testing.assert_close(decoded, whole[149:], rtol=2e-6, atol=2e-6)


def test_no_chunks_are_no_work(device: torch.device, generator: torch.Generator) -> None:
    paged, _ = chunks(device, generator)
    none = torch.empty(0, 4, 16, device=device)
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    out = prefill_attention(
        none, paged.keys, paged.values, paged.tables[:0], starts, paged.lens[:0], max_query_len=0, scale=1.0
    )
    assert out.shape == (0, 4, 16)
