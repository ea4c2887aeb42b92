"""decode_attention as a kernel, against float64; slots that are no row's are NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rolloutd.kernels.decode_attention import decode_attention, decode_attention_reference
from tests.kernels.paged import PagedRows, paged_rows

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of values near 1: what rounding weights and the result to the dtype costs."""
LENS = [1, 0, 17, 64, 65, 300, 5, 513]


def queries(rows: int, heads: int, dim: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, heads, dim, generator=generator).to(like.dtype).to(like.device)


def in_float64(q: Tensor, paged: PagedRows, **options: Any) -> Tensor:
    return decode_attention_reference(
        q.double(), paged.keys.double(), paged.values.double(), paged.tables, paged.lens, **options
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(4, 2, 64, 16), (7, 1, 16, 5), (3, 3, 80, 16), (6, 2, 96, 7), (2, 1, 128, 16), (2, 2, 256, 3)],
)
def test_rows_of_all_lengths(
    device: torch.device,
    generator: torch.Generator,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
) -> None:
    lens = [1, 0, 17, 65, 260] if head_dim <= 64 else [33, 0, 257]
    paged = paged_rows(
        lens,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
        generator=generator,
    )
    q = queries(len(lens), heads, head_dim, paged.keys, generator)
    scale = head_dim**-0.5
    out = decode_attention(q, paged.keys, paged.values, paged.tables, paged.lens, scale=scale)
    assert out.dtype == dtype
    assert_close(out, in_float64(q, paged, scale=scale))
    assert (out[1] == 0).all()


@pytest.fixture
def paged(device: torch.device, generator: torch.Generator) -> PagedRows:
    return paged_rows(
        LENS,
        num_kv_heads=2,
        head_dim=16,
        block_size=4,
        dtype=torch.float32,
        device=device,
        generator=generator,
        index_dtype=torch.int64,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 64},
        {"window": 100},
        {"window": 4096},
        {"softcap": 2.0},
        {"softcap": 50.0, "window": 33},
        {"scale": 4.0},
    ],
)
def test_windows_caps_and_large_scores(
    paged: PagedRows, device: torch.device, generator: torch.Generator, options: dict[str, Any]
) -> None:
    options = {"scale": 0.25, **options}
    q = queries(len(LENS), 6, 16, paged.keys, generator)
    out = decode_attention(q, paged.keys, paged.values, paged.tables, paged.lens, **options)
    assert_close(out, in_float64(q, paged, **options))


def test_a_row_has_the_same_bits_alone_in_other_blocks_and_beside_others(
    paged: PagedRows, generator: torch.Generator
) -> None:
    q = queries(len(LENS), 6, 16, paged.keys, generator)

    def attend(rows: PagedRows, some: slice) -> Tensor:
        return decode_attention(q[some], rows.keys, rows.values, rows.tables[some], rows.lens[some], scale=0.25)

    together = attend(paged, slice(None))
    assert torch.equal(attend(paged.permuted(generator), slice(None)), together)
    for row in (2, 5, 7):
        assert torch.equal(attend(paged, slice(row, row + 1)), together[row : row + 1])


def test_the_number_of_splits_changes_rounding_alone(paged: PagedRows, generator: torch.Generator) -> None:
    q = queries(len(LENS), 6, 16, paged.keys, generator)
    many, one = (
        decode_attention(q, paged.keys, paged.values, paged.tables, paged.lens, scale=0.25, split_keys=keys)
        for keys in (64, 1024)
    )
    torch.testing.assert_close(many, one, rtol=2e-6, atol=2e-6)


def test_queries_and_caches_may_be_strided(paged: PagedRows, device: torch.device, generator: torch.Generator) -> None:
    qkv = torch.randn(len(LENS), 10, 16, generator=generator).to(device)
    pair = torch.stack([paged.keys, paged.values], dim=1)  # keys and values interleaved by block
    out = decode_attention(qkv[:, :6], pair[:, 0], pair[:, 1], paged.tables, paged.lens, scale=0.25)
    assert_close(out, in_float64(qkv[:, :6], paged, scale=0.25))


def test_shapes_that_do_not_fit_are_refused(paged: PagedRows, device: torch.device) -> None:
    q = torch.zeros(len(LENS), 5, 16, device=device)
    with pytest.raises(ValueError, match="K a divisor of 5"):
        decode_attention(q, paged.keys, paged.values, paged.tables, paged.lens, scale=1.0)
    with pytest.raises(ValueError, match="split_keys=100 is no multiple of 64"):
        decode_attention(q[:, :4], paged.keys, paged.values, paged.tables, paged.lens, scale=1.0, split_keys=100)
