"""Attention of one query per sequence over its paged keys and values: split along the keys, then merged.

A split is a constant number of keys, so that a row's bits do not depend on the rows beside it (in Flash-Decoding, Dao
et al. 2023, it depends on the batch). The query heads of one kv head are the rows of one small matrix product.
The grid is as wide as the block table, as a captured graph needs it; a program beyond its row's length ends at once.

Shapes: R rows, H query heads, K kv heads, G = H / K, D head dim, N blocks, B block size, M blocks of a row, S splits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import HAS_TRITON, check, check_launchable, next_power_of_two

SPLIT = 256
"""Keys of a split."""

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def capped(scores: tl.tensor, softcap: tl.tensor) -> tl.tensor:
        """Return softcap * tanh(scores / softcap), without overflow."""
        e = tl.exp(-2.0 * tl.abs(scores / softcap))
        tanh = (1.0 - e) / (1.0 + e)
        return softcap * tl.where(scores < 0.0, -tanh, tanh)

    @triton.jit
    def attend_keys(
        q: tl.tensor,
        k_ptr: tl.tensor,
        v_ptr: tl.tensor,
        table_ptr: tl.tensor,
        k_stride_n: tl.tensor,
        k_stride_b: tl.tensor,
        v_stride_n: tl.tensor,
        v_stride_b: tl.tensor,
        begin: tl.tensor,
        end: tl.tensor,
        first: tl.tensor,
        scale: tl.tensor,
        softcap: tl.tensor,
        D: tl.constexpr,
        B: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_WINDOW: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
        """Return maximum, sum and values, all in base 2, of queries over one table's keys `begin` to `end`.

        With a window, keys before `first` are not seen.
        """
        dims = tl.arange(0, BLOCK_D)
        dim_mask = dims < D
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for at in range(begin, end, BLOCK_N):
            keys = at + tl.arange(0, BLOCK_N)
            seen = keys < end
            block = tl.load(table_ptr + keys // B, mask=seen, other=0).to(tl.int64)
            k_at = block * k_stride_n + (keys % B) * k_stride_b
            k = tl.load(k_ptr + k_at[None, :] + dims[:, None], mask=dim_mask[:, None] & seen[None, :], other=0.0)
            scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
            if HAS_SOFTCAP:
                scores = capped(scores, softcap)
            if HAS_WINDOW:
                seen = seen & (keys >= first)
            scores = tl.where(seen[None, :], scores * 1.4426950408889634, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            # A tile that lies before the window leaves the maximum at -inf: subtract 0 from it instead.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - shift[:, None])
            rescale = tl.exp2(top - shift)
            v_at = block * v_stride_n + (keys % B) * v_stride_b
            v = tl.load(v_ptr + v_at[:, None] + dims[None, :], mask=seen[:, None] & dim_mask[None, :], other=0.0)
            norm = norm * rescale + tl.sum(weights, axis=1)
            total = total * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            top = new_top
        return top, norm, total

    @triton.jit
    def decode_attention_kernel(
        q_ptr: tl.tensor,
        k_ptr: tl.tensor,
        v_ptr: tl.tensor,
        table_ptr: tl.tensor,
        len_ptr: tl.tensor,
        part_ptr: tl.tensor,
        state_ptr: tl.tensor,
        q_stride_r: tl.tensor,
        q_stride_h: tl.tensor,
        k_stride_n: tl.tensor,
        k_stride_b: tl.tensor,
        k_stride_k: tl.tensor,
        v_stride_n: tl.tensor,
        v_stride_b: tl.tensor,
        v_stride_k: tl.tensor,
        table_stride: tl.tensor,
        num_splits: tl.tensor,
        scale: tl.tensor,
        softcap: tl.tensor,
        window: tl.tensor,
        G: tl.constexpr,
        D: tl.constexpr,
        B: tl.constexpr,
        SPLIT_KEYS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_WINDOW: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ) -> None:
        """One program attends the G heads of one kv head of one row to one split."""
        row = tl.program_id(0).to(tl.int64)
        kv_head = tl.program_id(1).to(tl.int64)
        split = tl.program_id(2)
        length = tl.load(len_ptr + row).to(tl.int32)
        first = 0
        if HAS_WINDOW:
            first = tl.maximum(length - window, 0)
        begin = split * SPLIT_KEYS
        end = tl.minimum(begin + SPLIT_KEYS, length)
        if end <= begin or end <= first:
            return
        if HAS_WINDOW:
            begin = tl.maximum(begin, first // BLOCK_N * BLOCK_N)
        heads = tl.arange(0, BLOCK_G)
        dims = tl.arange(0, BLOCK_D)
        mask = (heads < G)[:, None] & (dims < D)[None, :]
        q_at = row * q_stride_r + (kv_head * G + heads)[:, None] * q_stride_h + dims[None, :]
        q = tl.load(q_ptr + q_at, mask=mask, other=0.0)
        top, norm, total = attend_keys(
            q,
            k_ptr + kv_head * k_stride_k,
            v_ptr + kv_head * v_stride_k,
            table_ptr + row * table_stride,
            k_stride_n,
            k_stride_b,
            v_stride_n,
            v_stride_b,
            begin,
            end,
            first,
            scale,
            softcap,
            D,
            B,
            HAS_SOFTCAP,
            HAS_WINDOW,
            PRECISION,
            BLOCK_G,
            BLOCK_D,
            BLOCK_N,
        )
        part = (row * num_splits + split) * (tl.num_programs(1) * G) + kv_head * G + heads
        tl.store(part_ptr + part[:, None] * D + dims[None, :], total, mask=mask)
        tl.store(state_ptr + part * 2, top, mask=heads < G)
        tl.store(state_ptr + part * 2 + 1, norm, mask=heads < G)

    @triton.jit
    def merge_splits_kernel(
        part_ptr: tl.tensor,
        state_ptr: tl.tensor,
        len_ptr: tl.tensor,
        prefix_ptr: tl.tensor,
        out_ptr: tl.tensor,
        out_stride_r: tl.tensor,
        out_stride_h: tl.tensor,
        num_splits: tl.tensor,
        window: tl.tensor,
        D: tl.constexpr,
        SPLIT_KEYS: tl.constexpr,
        HAS_WINDOW: tl.constexpr,
        HAS_PREFIX: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ) -> None:
        """One program merges the splits of one head of one row, in their order; splits without keys are not read.

        Splits of a prefix that is shared come first, and those of the rest begin where it ends.
        """
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1).to(tl.int64)
        num_heads = tl.num_programs(1)
        length = tl.load(len_ptr + row).to(tl.int32)
        first = 0
        if HAS_WINDOW:
            first = tl.maximum(length - window, 0) // SPLIT_KEYS
        last = (length + SPLIT_KEYS - 1) // SPLIT_KEYS
        if HAS_PREFIX:
            prefix = tl.minimum(tl.load(prefix_ptr + row).to(tl.int32), length)
            last = (prefix + SPLIT_KEYS - 1) // SPLIT_KEYS + (length - prefix + SPLIT_KEYS - 1) // SPLIT_KEYS
        dims = tl.arange(0, BLOCK_D)
        dim_mask = dims < D
        top = tl.full([], float("-inf"), tl.float32)
        norm = tl.zeros([], tl.float32)
        total = tl.zeros([BLOCK_D], tl.float32)
        for split in range(first, last):
            part = (row * num_splits + split) * num_heads + head
            split_top = tl.load(state_ptr + part * 2)
            split_norm = tl.load(state_ptr + part * 2 + 1)
            values = tl.load(part_ptr + part * D + dims, mask=dim_mask, other=0.0)
            new_top = tl.maximum(top, split_top)
            rescale, weight = tl.exp2(top - new_top), tl.exp2(split_top - new_top)
            norm = norm * rescale + split_norm * weight
            total = total * rescale + values * weight
            top = new_top
        out = tl.where(length > 0, total / tl.where(length > 0, norm, 1.0), 0.0)
        out_at = row * out_stride_r + head * out_stride_h + dims
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=dim_mask)


def decode_attention_config(head_dim: int, group_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Return tile sizes, warps and stages: a committed choice, so that nothing is tuned while a model serves.

    Exact fp32 products have no tensor cores and keep both factors in registers: their tiles are half as wide.
    """
    wide = head_dim > 128
    return {
        "BLOCK_G": max(16, next_power_of_two(group_size)),
        "BLOCK_D": max(16, next_power_of_two(head_dim)),
        "BLOCK_N": 32 if wide or dtype.itemsize > 2 else 64,
        "num_warps": 4,
        "num_stages": 2 if wide else 3,
    }


def merge_splits(
    parts: Tensor,
    states: Tensor,
    lens_R: Tensor,
    prefix_lens_R: Tensor | None,
    out_RHD: Tensor,
    *,
    window: int | None,
    split_keys: int,
) -> None:
    """Write to `out_RHD` what the splits of each row, [R, S, H, D] values and [R, S, H, 2] maxima and sums, make."""
    num_rows, num_heads, head_dim = out_RHD.shape
    merge_splits_kernel[(num_rows, num_heads)](
        parts,
        states,
        lens_R,
        lens_R if prefix_lens_R is None else prefix_lens_R,
        out_RHD,
        *out_RHD.stride()[:2],
        parts.shape[1],
        int(window or 0),
        D=head_dim,
        SPLIT_KEYS=split_keys,
        HAS_WINDOW=window is not None,
        HAS_PREFIX=prefix_lens_R is not None,
        BLOCK_D=next_power_of_two(head_dim),
        num_warps=1 if head_dim <= 128 else 2,
    )


def decode_attention(
    q_RHD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    block_tables_RM: Tensor,
    lens_R: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    split_keys: int = SPLIT,
) -> Tensor:
    """Return [R, H, D]: row r attends to its first `lens_R[r]` tokens, the last `window` of them; length 0 gives zeros.

    Tables and lengths are int32 or int64, `split_keys` is a multiple of 64. What lies in the cache beyond a row's
    length is not read. Raises `ValueError` on shapes, dtypes or strides that do not fit.
    """
    check_paged(q_RHD, k_cache_NBKD, v_cache_NBKD, block_tables_RM, lens_R)
    check(split_keys > 0 and split_keys % 64 == 0, f"decode_attention: split_keys={split_keys} is no multiple of 64.")
    check_launchable("decode_attention", q_RHD, k_cache_NBKD, v_cache_NBKD, block_tables_RM, lens_R)
    num_rows, num_heads, head_dim = q_RHD.shape
    block_size, num_kv_heads = k_cache_NBKD.shape[1:3]
    out_RHD = torch.empty_like(q_RHD, memory_format=torch.contiguous_format)
    num_splits = max(1, -(-block_tables_RM.shape[1] * block_size // split_keys))
    if num_rows == 0:
        return out_RHD
    parts = torch.empty((num_rows, num_splits, num_heads, head_dim), dtype=torch.float32, device=q_RHD.device)
    states = torch.empty((num_rows, num_splits, num_heads, 2), dtype=torch.float32, device=q_RHD.device)
    group_size = num_heads // num_kv_heads
    config = decode_attention_config(head_dim, group_size, q_RHD.dtype)
    decode_attention_kernel[(num_rows, num_kv_heads, num_splits)](
        q_RHD,
        k_cache_NBKD,
        v_cache_NBKD,
        block_tables_RM,
        lens_R,
        parts,
        states,
        *q_RHD.stride()[:2],
        *k_cache_NBKD.stride()[:3],
        *v_cache_NBKD.stride()[:3],
        block_tables_RM.stride(0),
        num_splits,
        float(scale),
        float(softcap or 0.0),
        int(window or 0),
        G=group_size,
        D=head_dim,
        B=block_size,
        SPLIT_KEYS=split_keys,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        PRECISION="ieee" if q_RHD.dtype == torch.float32 else "tf32",
        **config,
    )
    merge_splits(parts, states, lens_R, None, out_RHD, window=window, split_keys=split_keys)
    return out_RHD


def decode_attention_reference(
    q_RHD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    block_tables_RM: Tensor,
    lens_R: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return what `decode_attention` does, row by row, computed in the dtype of q."""
    check_paged(q_RHD, k_cache_NBKD, v_cache_NBKD, block_tables_RM, lens_R)
    group_size = q_RHD.shape[1] // k_cache_NBKD.shape[2]
    out_RHD = torch.zeros_like(q_RHD)
    for row, length in enumerate(lens_R.tolist()):
        if length == 0:
            continue
        table = block_tables_RM[row].long()
        first = 0 if window is None else max(0, length - window)
        k_LHD, v_LHD = (
            cache[table[: -(-length // cache.shape[1])]].flatten(0, 1)[first:length].repeat_interleave(group_size, 1)
            for cache in (k_cache_NBKD, v_cache_NBKD)
        )
        scores_HL = torch.einsum("hd,lhd->hl", q_RHD[row], k_LHD.to(q_RHD.dtype)) * scale
        if softcap is not None:
            scores_HL = softcap * torch.tanh(scores_HL / softcap)
        out_RHD[row] = torch.einsum("hl,lhd->hd", scores_HL.softmax(-1), v_LHD.to(q_RHD.dtype))
    return out_RHD


def check_paged(q_RHD: Tensor, k_NBKD: Tensor, v_NBKD: Tensor, tables_RM: Tensor, lens_R: Tensor) -> None:
    """Raise `ValueError` unless queries, caches, tables and lengths fit each other."""
    q, k = tuple(q_RHD.shape), tuple(k_NBKD.shape)
    check(len(q) == 3, f"decode_attention: q {q} is not [R, H, D].")
    check(
        len(k) == 4 and tuple(v_NBKD.shape) == k and k[3] == q[2] and q[1] % k[2] == 0,
        f"decode_attention: caches {k}, {tuple(v_NBKD.shape)} are not one [N, B, K, {q[2]}], K a divisor of {q[1]}.",
    )
    check(k_NBKD.dtype == v_NBKD.dtype, "decode_attention: the two caches differ in dtype.")
    check(
        tables_RM.dim() == 2 and tables_RM.shape[0] == q[0] and tuple(lens_R.shape) == q[:1],
        f"decode_attention: tables {tuple(tables_RM.shape)}, lens {tuple(lens_R.shape)} are not [{q[0]}, M], [{q[0]}].",
    )
    integers = (torch.int32, torch.int64)
    check(
        tables_RM.dtype in integers and lens_R.dtype in integers, "decode_attention: tables and lens must be integers."
    )
    for name, tensor in (("q", q_RHD), ("k_cache", k_NBKD), ("v_cache", v_NBKD), ("block_tables", tables_RM)):
        check(
            tensor.stride(-1) == 1 or tensor.shape[-1] == 1, f"decode_attention: {name} is not contiguous at the end."
        )
    check(lens_R.is_contiguous(), "decode_attention: lens is not contiguous.")
