"""Decode attention that reads the KV of a group's prompt once for all its samples, as Hydragen (Juravsky et al. 2024).

The samples of a prompt name the same blocks at the beginning of their tables. An *item* is up to 8 of them: one program
packs their queries into one product with a split of the prefix. What follows the prefix each row attends to by itself,
in programs of the same launch; the splits of both are merged by the second launch, as in `decode_attention`.

Shapes as in decode_attention.py; I items, W = 8 rows of an item.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decode_attention import (
    SPLIT,
    check_paged,
    decode_attention_config,
    decode_attention_reference,
    merge_splits,
)
from .launch import HAS_TRITON, check, check_launchable, next_power_of_two

ITEM_ROWS = 8
"""Rows of an item: a usual size of groups in GRPO, and with the 6 or 7 query heads that a kv head has in Qwen2.5 one
tile of 64. Larger groups are several items."""

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .decode_attention import attend_keys

    @triton.jit
    def attend_item(
        q_ptr: tl.tensor,
        k_ptr: tl.tensor,
        v_ptr: tl.tensor,
        table_ptr: tl.tensor,
        prefix_ptr: tl.tensor,
        item_ptr: tl.tensor,
        part_ptr: tl.tensor,
        state_ptr: tl.tensor,
        q_stride_r: tl.tensor,
        q_stride_h: tl.tensor,
        kv_stride_n: tl.tensor,
        kv_stride_b: tl.tensor,
        table_stride: tl.tensor,
        num_splits: tl.tensor,
        scale: tl.tensor,
        softcap: tl.tensor,
        G: tl.constexpr,
        D: tl.constexpr,
        B: tl.constexpr,
        W: tl.constexpr,
        SPLIT_KEYS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ) -> None:
        """Attend the rows of one item, all heads of one kv head, to one split of their prefix."""
        lead = tl.load(item_ptr).to(tl.int64)
        split = tl.program_id(2)
        begin = split * SPLIT_KEYS
        end = tl.minimum(begin + SPLIT_KEYS, tl.load(prefix_ptr + lead, mask=lead >= 0, other=0).to(tl.int32))
        if begin < end:
            places, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
            member = places // G
            row = tl.load(item_ptr + member, mask=member < W, other=-1).to(tl.int64)
            head = tl.program_id(1).to(tl.int64) * G + places % G
            mask = (row >= 0)[:, None] & (dims < D)[None, :]
            q_at = (row * q_stride_r + head * q_stride_h)[:, None] + dims[None, :]
            top, norm, total = attend_keys(
                tl.load(q_ptr + q_at, mask=mask, other=0.0),
                k_ptr,
                v_ptr,
                table_ptr + lead * table_stride,
                kv_stride_n,
                kv_stride_b,
                kv_stride_n,
                kv_stride_b,
                begin,
                end,
                0,
                scale,
                softcap,
                D,
                B,
                HAS_SOFTCAP,
                False,
                PRECISION,
                BLOCK_M,
                BLOCK_D,
                BLOCK_N,
            )
            part = (row * num_splits + split) * (tl.num_programs(1) * G) + head
            tl.store(part_ptr + part[:, None] * D + dims[None, :], total, mask=mask)
            tl.store(state_ptr + part * 2, top, mask=row >= 0)
            tl.store(state_ptr + part * 2 + 1, norm, mask=row >= 0)

    @triton.jit
    def attend_rest(
        q_ptr: tl.tensor,
        k_ptr: tl.tensor,
        v_ptr: tl.tensor,
        table_ptr: tl.tensor,
        len_ptr: tl.tensor,
        prefix_ptr: tl.tensor,
        part_ptr: tl.tensor,
        state_ptr: tl.tensor,
        row: tl.tensor,
        q_stride_h: tl.tensor,
        kv_stride_n: tl.tensor,
        kv_stride_b: tl.tensor,
        num_splits: tl.tensor,
        scale: tl.tensor,
        softcap: tl.tensor,
        G: tl.constexpr,
        D: tl.constexpr,
        B: tl.constexpr,
        SPLIT_KEYS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ) -> None:
        """Attend one row, all heads of one kv head, to one split of what follows its prefix."""
        length = tl.load(len_ptr + row).to(tl.int32)
        shared = tl.minimum(tl.load(prefix_ptr + row).to(tl.int32), length)
        split = tl.program_id(2)
        first_split = (shared + SPLIT_KEYS - 1) // SPLIT_KEYS
        begin = shared + (split - first_split) * SPLIT_KEYS
        end = tl.minimum(begin + SPLIT_KEYS, length)
        if (split >= first_split) & (begin < end):
            heads, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
            head = tl.program_id(1).to(tl.int64) * G + heads
            mask = (heads < G)[:, None] & (dims < D)[None, :]
            top, norm, total = attend_keys(
                tl.load(q_ptr + head[:, None] * q_stride_h + dims[None, :], mask=mask, other=0.0),
                k_ptr,
                v_ptr,
                table_ptr,
                kv_stride_n,
                kv_stride_b,
                kv_stride_n,
                kv_stride_b,
                begin,
                end,
                0,
                scale,
                softcap,
                D,
                B,
                HAS_SOFTCAP,
                False,
                PRECISION,
                BLOCK_G,
                BLOCK_D,
                BLOCK_N,
            )
            part = (row * num_splits + split) * (tl.num_programs(1) * G) + head
            tl.store(part_ptr + part[:, None] * D + dims[None, :], total, mask=mask)
            tl.store(state_ptr + part * 2, top, mask=heads < G)
            tl.store(state_ptr + part * 2 + 1, norm, mask=heads < G)

    @triton.jit
    def prefix_attention_kernel(
        q_ptr: tl.tensor,
        k_ptr: tl.tensor,
        v_ptr: tl.tensor,
        table_ptr: tl.tensor,
        len_ptr: tl.tensor,
        prefix_ptr: tl.tensor,
        item_ptr: tl.tensor,
        part_ptr: tl.tensor,
        state_ptr: tl.tensor,
        q_stride_r: tl.tensor,
        q_stride_h: tl.tensor,
        kv_stride_n: tl.tensor,
        kv_stride_b: tl.tensor,
        kv_stride_k: tl.tensor,
        table_stride: tl.tensor,
        num_items: tl.tensor,
        num_splits: tl.tensor,
        scale: tl.tensor,
        softcap: tl.tensor,
        G: tl.constexpr,
        D: tl.constexpr,
        B: tl.constexpr,
        W: tl.constexpr,
        SPLIT_KEYS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ) -> None:
        """The first `num_items` programs of the first axis are items, the others rows.

        Groups stand side by side: programs that run together read the same keys.
        """
        program = tl.program_id(0).to(tl.int64)
        at_head = tl.program_id(1).to(tl.int64) * kv_stride_k
        if program < num_items:
            attend_item(
                q_ptr,
                k_ptr + at_head,
                v_ptr + at_head,
                table_ptr,
                prefix_ptr,
                item_ptr + program * W,
                part_ptr,
                state_ptr,
                q_stride_r,
                q_stride_h,
                kv_stride_n,
                kv_stride_b,
                table_stride,
                num_splits,
                scale,
                softcap,
                G,
                D,
                B,
                W,
                SPLIT_KEYS,
                HAS_SOFTCAP,
                PRECISION,
                BLOCK_M,
                BLOCK_D,
                BLOCK_N,
            )
        else:
            row = program - num_items
            attend_rest(
                q_ptr + row * q_stride_r,
                k_ptr + at_head,
                v_ptr + at_head,
                table_ptr + row * table_stride,
                len_ptr,
                prefix_ptr,
                part_ptr,
                state_ptr,
                row,
                q_stride_h,
                kv_stride_n,
                kv_stride_b,
                num_splits,
                scale,
                softcap,
                G,
                D,
                B,
                SPLIT_KEYS,
                HAS_SOFTCAP,
                PRECISION,
                BLOCK_G,
                BLOCK_D,
                BLOCK_N,
            )


def prefix_attention_config(head_dim: int, group_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Return tile sizes, warps and stages: those of decoding rows, and the tile of an item."""
    config = decode_attention_config(head_dim, group_size, dtype)
    block_m = max(16, next_power_of_two(ITEM_ROWS * group_size))
    # 4 warps would keep 64 x 128 sums in 255 registers and spill 28 to 30 of them (compiled for sm_90, triton 3.9).
    num_warps = 8 if block_m * config["BLOCK_D"] > 4096 or head_dim > 128 or dtype.itemsize > 2 else config["num_warps"]
    return config | {"BLOCK_M": block_m, "num_warps": num_warps}


def prefix_attention(
    q_RHD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    block_tables_RM: Tensor,
    lens_R: Tensor,
    prefix_lens_R: Tensor,
    item_rows_IW: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    split_keys: int = SPLIT,
) -> Tensor:
    """Return what `decode_attention` does, given which rows begin with the same blocks.

    The first `prefix_lens_R[r]` tokens of row r, a multiple of the block size below its length, are those of its item;
    0 where it is in none. An item's rows stand at the beginning of its line, -1 after them, or alone in one that is
    not used; each has the same blocks and the same prefix, and is in no other item. Both lists are int32. A row that
    has ended (length 0) may stay in its item. The kernel cannot check what the lists say; the reference does.
    Raises `ValueError` on shapes, dtypes or strides that do not fit.
    """
    _check(q_RHD, k_cache_NBKD, v_cache_NBKD, block_tables_RM, lens_R, prefix_lens_R, item_rows_IW)
    check(split_keys > 0 and split_keys % 64 == 0, f"prefix_attention: split_keys={split_keys} is no multiple of 64.")
    tensors = (q_RHD, k_cache_NBKD, v_cache_NBKD, block_tables_RM, lens_R, prefix_lens_R, item_rows_IW)
    check_launchable("prefix_attention", *tensors)
    num_rows, num_heads, head_dim = q_RHD.shape
    block_size, num_kv_heads = k_cache_NBKD.shape[1:3]
    out_RHD = torch.empty_like(q_RHD, memory_format=torch.contiguous_format)
    if num_rows == 0:
        return out_RHD
    num_items = item_rows_IW.shape[0]
    num_splits = max(1, -(-block_tables_RM.shape[1] * block_size // split_keys)) + 1  # the prefix ends inside of one
    parts = torch.empty((num_rows, num_splits, num_heads, head_dim), dtype=torch.float32, device=q_RHD.device)
    states = torch.empty((num_rows, num_splits, num_heads, 2), dtype=torch.float32, device=q_RHD.device)
    group_size = num_heads // num_kv_heads
    prefix_attention_kernel[(num_items + num_rows, num_kv_heads, num_splits)](
        *tensors,
        parts,
        states,
        *q_RHD.stride()[:2],
        *k_cache_NBKD.stride()[:3],
        block_tables_RM.stride(0),
        num_items,
        num_splits,
        float(scale),
        float(softcap or 0.0),
        G=group_size,
        D=head_dim,
        B=block_size,
        W=ITEM_ROWS,
        SPLIT_KEYS=split_keys,
        HAS_SOFTCAP=softcap is not None,
        PRECISION="ieee" if q_RHD.dtype == torch.float32 else "tf32",
        **prefix_attention_config(head_dim, group_size, q_RHD.dtype),
    )
    merge_splits(parts, states, lens_R, prefix_lens_R, out_RHD, window=None, split_keys=split_keys)
    return out_RHD


def prefix_attention_reference(
    q_RHD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    block_tables_RM: Tensor,
    lens_R: Tensor,
    prefix_lens_R: Tensor,
    item_rows_IW: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Return what `prefix_attention` does, the prefix of each row read by the table of its item's first.

    `ValueError` where a row with a prefix is in no item or in two, where its item has another prefix, or where it ends
    inside of it.
    """
    _check(q_RHD, k_cache_NBKD, v_cache_NBKD, block_tables_RM, lens_R, prefix_lens_R, item_rows_IW)
    tables_RM, block_size = block_tables_RM.clone(), k_cache_NBKD.shape[1]
    prefix_lens, lens = prefix_lens_R.tolist(), lens_R.tolist()
    seen: list[int] = []
    for item in item_rows_IW.tolist():
        rows = [row for row in item if row >= 0]
        check(rows == item[: len(rows)], f"prefix_attention: rows of item {item} do not stand at its beginning.")
        for row in rows:
            prefix = prefix_lens[rows[0]]
            fits = prefix_lens[row] == prefix > 0 == prefix % block_size and (lens[row] == 0 or lens[row] > prefix)
            check(fits, f"prefix_attention: row {row} does not fit item {item} with a prefix of {prefix}.")
            tables_RM[row, : prefix // block_size] = block_tables_RM[rows[0], : prefix // block_size]
        seen += rows
    expected = [row for row, prefix in enumerate(prefix_lens) if prefix]
    check(sorted(seen) == expected, f"prefix_attention: items hold rows {sorted(seen)}, prefixes have {expected}.")
    return decode_attention_reference(
        q_RHD, k_cache_NBKD, v_cache_NBKD, tables_RM, lens_R, scale=scale, softcap=softcap
    )


def _check(
    q_RHD: Tensor,
    k_NBKD: Tensor,
    v_NBKD: Tensor,
    tables_RM: Tensor,
    lens_R: Tensor,
    prefix_lens_R: Tensor,
    item_rows_IW: Tensor,
) -> None:
    check_paged(q_RHD, k_NBKD, v_NBKD, tables_RM, lens_R)
    check(k_NBKD.stride() == v_NBKD.stride(), "prefix_attention: the two caches are laid out in different ways.")
    prefixes, items = tuple(prefix_lens_R.shape), tuple(item_rows_IW.shape)
    check(prefixes == tuple(lens_R.shape), f"prefix_attention: prefix_lens {prefixes} is not [{lens_R.shape[0]}].")
    check(len(items) == 2 and items[1] == ITEM_ROWS, f"prefix_attention: items {items} are not [I, {ITEM_ROWS}].")
    for name, tensor in (("prefix_lens", prefix_lens_R), ("item_rows", item_rows_IW)):
        fits = tensor.dtype == torch.int32 and tensor.is_contiguous()
        check(fits, f"prefix_attention: {name} is {tensor.dtype}, expected contiguous int32.")
