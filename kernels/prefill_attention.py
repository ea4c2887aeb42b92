"""Causal attention of chunks of several sequences over their paged keys and values (FlashAttention-2, Dao 2023).

A chunk's queries are the last tokens that its sequence has in the cache; their own keys lie there already.
Shapes: T rows of all chunks, S chunks, H query heads, K kv heads, G = H / K, D head dim, N blocks, B block size, M
blocks of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decode_attention import decode_attention_reference
from .launch import HAS_TRITON, check, check_launchable, next_power_of_two

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .decode_attention import capped

    @triton.jit
    def prefill_attention_kernel(
        q_ptr: tl.tensor,
        k_ptr: tl.tensor,
        v_ptr: tl.tensor,
        table_ptr: tl.tensor,
        start_ptr: tl.tensor,
        len_ptr: tl.tensor,
        out_ptr: tl.tensor,
        q_stride_t: tl.tensor,
        q_stride_h: tl.tensor,
        k_stride_n: tl.tensor,
        k_stride_b: tl.tensor,
        k_stride_k: tl.tensor,
        v_stride_n: tl.tensor,
        v_stride_b: tl.tensor,
        v_stride_k: tl.tensor,
        table_stride: tl.tensor,
        out_stride_t: tl.tensor,
        out_stride_h: tl.tensor,
        scale: tl.tensor,
        softcap: tl.tensor,
        window: tl.tensor,
        G: tl.constexpr,
        D: tl.constexpr,
        B: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_WINDOW: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ) -> None:
        """One program attends BLOCK_M queries of one head of one chunk; its softmax is in base 2."""
        tile = tl.program_id(0)
        head = tl.program_id(1).to(tl.int64)
        chunk = tl.program_id(2).to(tl.int64)
        first_row = tl.load(start_ptr + chunk).to(tl.int32)
        num_queries = tl.load(start_ptr + chunk + 1).to(tl.int32) - first_row
        if tile * BLOCK_M >= num_queries:
            return
        length = tl.load(len_ptr + chunk).to(tl.int32)
        queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = queries < num_queries
        positions = length - num_queries + queries
        dims = tl.arange(0, BLOCK_D)
        dim_mask = dims < D
        rows = (first_row + queries).to(tl.int64)
        mask = row_mask[:, None] & dim_mask[None, :]
        q = tl.load(q_ptr + rows[:, None] * q_stride_t + head * q_stride_h + dims[None, :], mask=mask, other=0.0)
        kv_head = head // G
        begin = 0
        end = tl.minimum(length, length - num_queries + (tile + 1) * BLOCK_M)
        if HAS_WINDOW:
            begin = tl.maximum(length - num_queries + tile * BLOCK_M - window + 1, 0) // BLOCK_N * BLOCK_N
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for at in range(begin, end, BLOCK_N):
            keys = at + tl.arange(0, BLOCK_N)
            stored = keys < end
            block = tl.load(table_ptr + chunk * table_stride + keys // B, mask=stored, other=0).to(tl.int64)
            k_at = block * k_stride_n + (keys % B) * k_stride_b + kv_head * k_stride_k
            k = tl.load(k_ptr + k_at[None, :] + dims[:, None], mask=dim_mask[:, None] & stored[None, :], other=0.0)
            scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
            if HAS_SOFTCAP:
                scores = capped(scores, softcap)
            seen = stored[None, :] & (keys[None, :] <= positions[:, None])
            if HAS_WINDOW:
                seen = seen & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - shift[:, None])
            rescale = tl.exp2(top - shift)
            v_at = block * v_stride_n + (keys % B) * v_stride_b + kv_head * v_stride_k
            v = tl.load(v_ptr + v_at[:, None] + dims[None, :], mask=stored[:, None] & dim_mask[None, :], other=0.0)
            norm = norm * rescale + tl.sum(weights, axis=1)
            total = total * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            top = new_top
        # Rows of padding see nothing where the window is narrow; they are not stored.
        out = total / tl.where(norm > 0.0, norm, 1.0)[:, None]
        out_at = rows[:, None] * out_stride_t + head * out_stride_h + dims[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


def prefill_attention_config(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Return tile sizes, warps and stages: a committed choice, without spills on the GPUs of tests/kernels/aot.py.

    Exact fp32 products have no tensor cores and keep both factors in registers: their tiles are smaller.
    """
    wide = head_dim > 128
    exact = dtype.itemsize > 2
    return {
        "BLOCK_M": 32 if exact else 64,
        "BLOCK_D": max(16, next_power_of_two(head_dim)),
        "BLOCK_N": 32 if wide or exact else 64,
        "num_warps": 4 if head_dim <= 64 and not exact else 8,
        "num_stages": 3 if head_dim <= 64 else 2,
    }


def prefill_attention(
    q_THD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    block_tables_SM: Tensor,
    starts_S1: Tensor,
    lens_S: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return [T, H, D]: chunk s has rows `starts_S1[s] : starts_S1[s + 1]`, its last one attends to `lens_S[s]` tokens.

    The one before attends to one less, and so on; no further back than `window`, itself included. `max_query_len` is
    at least the longest chunk. Rows of no chunk come back undefined. Raises `ValueError` on what does not fit.
    """
    _check(q_THD, k_cache_NBKD, v_cache_NBKD, block_tables_SM, starts_S1, lens_S)
    check_launchable("prefill_attention", q_THD, k_cache_NBKD, v_cache_NBKD, block_tables_SM, starts_S1, lens_S)
    num_chunks = lens_S.shape[0]
    num_heads, head_dim = q_THD.shape[1:]
    block_size, num_kv_heads = k_cache_NBKD.shape[1:3]
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    if num_chunks == 0 or max_query_len == 0:
        return out_THD
    config = prefill_attention_config(head_dim, q_THD.dtype)
    prefill_attention_kernel[(-(-max_query_len // config["BLOCK_M"]), num_heads, num_chunks)](
        q_THD,
        k_cache_NBKD,
        v_cache_NBKD,
        block_tables_SM,
        starts_S1,
        lens_S,
        out_THD,
        *q_THD.stride()[:2],
        *k_cache_NBKD.stride()[:3],
        *v_cache_NBKD.stride()[:3],
        block_tables_SM.stride(0),
        *out_THD.stride()[:2],
        float(scale),
        float(softcap or 0.0),
        int(window or 0),
        G=num_heads // num_kv_heads,
        D=head_dim,
        B=block_size,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        **config,
    )
    return out_THD


def prefill_attention_reference(
    q_THD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    block_tables_SM: Tensor,
    starts_S1: Tensor,
    lens_S: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return what `prefill_attention` does: each query as a decoding row. Rows of no chunk are zero."""
    _check(q_THD, k_cache_NBKD, v_cache_NBKD, block_tables_SM, starts_S1, lens_S)
    chunk_of_row = torch.zeros(q_THD.shape[0], dtype=torch.int64, device=q_THD.device)
    lens_T = torch.zeros_like(chunk_of_row)
    starts = starts_S1.tolist()
    for chunk, length in enumerate(lens_S.tolist()):
        rows = slice(starts[chunk], starts[chunk + 1])
        chunk_of_row[rows] = chunk
        lens_T[rows] = torch.arange(length - (rows.stop - rows.start), length, device=q_THD.device) + 1
    tables_TM = block_tables_SM[chunk_of_row]
    return decode_attention_reference(
        q_THD, k_cache_NBKD, v_cache_NBKD, tables_TM, lens_T, scale=scale, window=window, softcap=softcap
    )


def _check(q_THD: Tensor, k_NBKD: Tensor, v_NBKD: Tensor, tables_SM: Tensor, starts_S1: Tensor, lens_S: Tensor) -> None:
    q, k = tuple(q_THD.shape), tuple(k_NBKD.shape)
    check(len(q) == 3, f"prefill_attention: q {q} is not [T, H, D].")
    check(
        len(k) == 4 and tuple(v_NBKD.shape) == k and k[3] == q[2] and q[1] % k[2] == 0,
        f"prefill_attention: caches {k}, {tuple(v_NBKD.shape)} are not one [N, B, K, {q[2]}], K a divisor of {q[1]}.",
    )
    check(k_NBKD.dtype == v_NBKD.dtype, "prefill_attention: the two caches differ in dtype.")
    num_chunks = lens_S.shape[0] if lens_S.dim() == 1 else -1
    check(
        tables_SM.dim() == 2 and tables_SM.shape[0] == num_chunks and tuple(starts_S1.shape) == (num_chunks + 1,),
        f"prefill_attention: tables {tuple(tables_SM.shape)}, starts {tuple(starts_S1.shape)} and lens "
        f"{tuple(lens_S.shape)} are not [S, M], [S + 1], [S].",
    )
    for name, tensor in (("tables", tables_SM), ("starts", starts_S1), ("lens", lens_S)):
        check(tensor.dtype in (torch.int32, torch.int64), f"prefill_attention: {name} must be integers.")
    for name, tensor in (("q", q_THD), ("k_cache", k_NBKD), ("v_cache", v_NBKD), ("block_tables", tables_SM)):
        check(
            tensor.stride(-1) == 1 or tensor.shape[-1] == 1, f"prefill_attention: {name} is not contiguous at the end."
        )
