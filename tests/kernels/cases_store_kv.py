"""store_kv as a kernel: every copy is compared exactly, and everything that must stay is poisoned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rolloutd.kernels.store_kv import store_kv, store_kv_reference

NAN = float("nan")


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype, device=device)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "num_kv_heads", "head_dim", "block_size"),
    [(1, 1, 2, 1), (7, 3, 2, 5), (5, 2, 64, 16), (9, 5, 80, 3), (2, 8, 128, 16)],
)
def test_rows_land_in_their_slots_and_nothing_else_moves(
    device: torch.device,
    generator: torch.Generator,
    dtype: torch.dtype,
    num_rows: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
) -> None:
    num_blocks = 2 + num_rows // block_size
    k, v = (torch.randn(2, num_rows, num_kv_heads, head_dim, generator=generator).to(dtype)).to(device)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_rows].to(device)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k_cache, v_cache = poisoned(shape, dtype, device), poisoned(shape, dtype, device)
    store_kv(k, v, k_cache, v_cache, slots)
    k_want, v_want = poisoned(shape, dtype, device), poisoned(shape, dtype, device)
    for t, slot in enumerate(slots.tolist()):
        k_want[slot // block_size, slot % block_size] = k[t]
        v_want[slot // block_size, slot % block_size] = v[t]
    assert_same(k_cache, k_want)
    assert_same(v_cache, v_want)


def test_skipped_rows_are_not_written_even_where_they_hold_nan(
    device: torch.device, generator: torch.Generator
) -> None:
    k, v = torch.randn(2, 4, 2, 6, generator=generator).to(device)
    k[1], v[1], k[3], v[3] = NAN, NAN, NAN, NAN
    slots = torch.tensor([3, -1, 0, -1], device=device)
    caches = [torch.zeros(2, 2, 2, 6, device=device) for _ in range(4)]
    store_kv(k, v, caches[0], caches[1], slots)
    store_kv_reference(k, v, caches[2], caches[3], slots)
    assert not caches[0].isnan().any()
    assert not caches[1].isnan().any()
    assert_same(caches[0], caches[2])
    assert_same(caches[1], caches[3])
    assert_same(caches[0][0, 0], k[2])


def test_slots_outside_the_pool_write_nothing(device: torch.device) -> None:
    big = poisoned((6, 2, 1, 4), torch.float32, device)
    pool = big[2:4]  # neighbours on both sides would show a stray write
    before = big.clone()
    rows = torch.ones(3, 1, 4, device=device)
    store_kv(rows, rows, pool, pool.clone(), torch.tensor([4, -2, 1 << 40], device=device))
    assert_same(big, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_rows_are_rounded_to_nearest_even(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype
) -> None:
    k, v = torch.randn(2, 5, 2, 33, generator=generator).to(device)
    k[0, 0, :3] = torch.tensor([1.00390625, 1.01171875, -0.0])  # two bf16 ties, and the sign of zero
    slots = torch.tensor([8, 2, 5, 1, 0], device=device)
    k_cache, v_cache = (poisoned((3, 3, 2, 33), dtype, device) for _ in range(2))
    store_kv(k, v, k_cache, v_cache, slots)
    assert_same(k_cache.flatten(0, 1)[slots], k.to(dtype))
    assert_same(v_cache.flatten(0, 1)[slots], v.to(dtype))
    assert torch.signbit(k_cache[2, 2, 0, 2])


def test_rows_and_caches_may_be_strided(device: torch.device, generator: torch.Generator) -> None:
    num_rows, heads, kv_heads, head_dim = 6, 4, 2, 10
    qkv = torch.randn(num_rows, heads + 2 * kv_heads, head_dim + 3, generator=generator).to(device)
    k, v = qkv[:, heads : heads + kv_heads, :head_dim], qkv[:, heads + kv_heads :, :head_dim]
    pair = poisoned((4, 2, 3, kv_heads, head_dim), torch.float32, device)  # keys and values interleaved by block
    slots = torch.tensor([11, 0, 4, -1, 7, 2], device=device)
    store_kv(k, v, pair[:, 0], pair[:, 1], slots)
    want = poisoned((2, 12, kv_heads, head_dim), torch.float32, device)
    kept = slots >= 0
    want[0, slots[kept]], want[1, slots[kept]] = k[kept], v[kept]
    assert_same(pair.transpose(0, 1).reshape(2, 12, kv_heads, head_dim), want)


def test_keys_and_values_each_have_their_own_strides(device: torch.device, generator: torch.Generator) -> None:
    k = torch.randn(5, 2, 7, generator=generator).to(device)
    v = torch.randn(2, 5, 9, generator=generator).to(device).transpose(0, 1)[..., :7]  # heads outermost
    k_cache = poisoned((3, 2, 2, 7), torch.float32, device)
    v_cache = poisoned((2, 2, 3, 8), torch.float32, device).permute(2, 1, 0, 3)[..., :7]
    slots = torch.tensor([5, 0, 3, 2, 1], device=device)
    store_kv(k, v, k_cache, v_cache, slots)
    for rows, cache in ((k, k_cache), (v, v_cache)):
        want = poisoned((6, 2, 7), torch.float32, device)
        want[slots] = rows
        assert_same(cache.reshape(6, 2, 7), want)


def test_no_rows_are_no_work(device: torch.device) -> None:
    cache = poisoned((1, 2, 1, 4), torch.float32, device)
    rows = torch.empty(0, 1, 4, device=device)
    store_kv(rows, rows, cache, cache, torch.empty(0, dtype=torch.int64, device=device))
    assert cache.isnan().all()


def test_a_head_dim_that_is_not_contiguous_is_refused(device: torch.device) -> None:
    rows = torch.ones(2, 4, 3, device=device).transpose(1, 2)
    cache = torch.zeros(2, 2, 3, 4, device=device)
    with pytest.raises(ValueError, match="k is not contiguous along head_dim"):
        store_kv(rows, rows, cache, cache, torch.tensor([0, 1], device=device))
