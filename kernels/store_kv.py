"""Write the keys and values of a step into the paged cache.

Shapes: T rows of this step, K kv heads, D head dim, N blocks, B block size; slot = block * B + place in the block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import HAS_TRITON, check, check_launchable, next_power_of_two

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def store_kv_kernel(
        k_ptr: tl.tensor,
        v_ptr: tl.tensor,
        k_cache_ptr: tl.tensor,
        v_cache_ptr: tl.tensor,
        slot_ptr: tl.tensor,
        num_slots: tl.tensor,
        k_stride_t: tl.tensor,
        k_stride_k: tl.tensor,
        v_stride_t: tl.tensor,
        v_stride_k: tl.tensor,
        k_cache_stride_n: tl.tensor,
        k_cache_stride_b: tl.tensor,
        k_cache_stride_k: tl.tensor,
        v_cache_stride_n: tl.tensor,
        v_cache_stride_b: tl.tensor,
        v_cache_stride_k: tl.tensor,
        B: tl.constexpr,
        K: tl.constexpr,
        D: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ) -> None:
        """One program copies one row of K heads. D is contiguous everywhere."""
        row = tl.program_id(0).to(tl.int64)
        slot = tl.load(slot_ptr + row).to(tl.int64)
        if slot < 0 or slot >= num_slots:
            return
        heads = tl.arange(0, BLOCK_K).to(tl.int64)[:, None]
        dims = tl.arange(0, BLOCK_D)[None, :]
        mask = (heads < K) & (dims < D)
        block, place = slot // B, slot % B
        k = tl.load(k_ptr + row * k_stride_t + heads * k_stride_k + dims, mask=mask, other=0.0)
        v = tl.load(v_ptr + row * v_stride_t + heads * v_stride_k + dims, mask=mask, other=0.0)
        k_at = block * k_cache_stride_n + place * k_cache_stride_b + heads * k_cache_stride_k + dims
        v_at = block * v_cache_stride_n + place * v_cache_stride_b + heads * v_cache_stride_k + dims
        tl.store(k_cache_ptr + k_at, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
        tl.store(v_cache_ptr + v_at, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def store_kv(k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slot_mapping_T: Tensor) -> None:
    """Write row t of k and v to slot `slot_mapping_T[t]` of both caches, cast to the cache's dtype; -1 skips the row.

    Slots are distinct int64. The kernel cannot report a slot outside the pool without a synchronisation: it writes
    nothing for it, while the reference raises. Raises `ValueError` on shapes, dtypes or strides that do not fit.
    """
    _check_shapes(k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slot_mapping_T)
    for name, tensor in (("k", k_TKD), ("v", v_TKD), ("k_cache", k_cache_NBKD), ("v_cache", v_cache_NBKD)):
        check(tensor.stride(-1) == 1 or tensor.shape[-1] == 1, f"store_kv: {name} is not contiguous along head_dim.")
    check(slot_mapping_T.is_contiguous(), "store_kv: slot_mapping is not contiguous.")
    check_launchable("store_kv", k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slot_mapping_T)
    num_rows, num_kv_heads, head_dim = k_TKD.shape
    if num_rows == 0:
        return
    num_blocks, block_size = k_cache_NBKD.shape[:2]
    store_kv_kernel[(num_rows,)](
        k_TKD,
        v_TKD,
        k_cache_NBKD,
        v_cache_NBKD,
        slot_mapping_T,
        num_blocks * block_size,
        *k_TKD.stride()[:2],
        *v_TKD.stride()[:2],
        *k_cache_NBKD.stride()[:3],
        *v_cache_NBKD.stride()[:3],
        B=block_size,
        K=num_kv_heads,
        D=head_dim,
        BLOCK_K=next_power_of_two(num_kv_heads),
        BLOCK_D=next_power_of_two(head_dim),
        enable_fp_fusion=False,
    )


def store_kv_reference(
    k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slot_mapping_T: Tensor
) -> None:
    """Do what `store_kv` does, on any device; `IndexError` on a slot outside the pool."""
    _check_shapes(k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slot_mapping_T)
    rows = slot_mapping_T != -1
    slots = slot_mapping_T[rows]
    num_slots = k_cache_NBKD.shape[0] * k_cache_NBKD.shape[1]
    if bool(((slots < 0) | (slots >= num_slots)).any()):
        raise IndexError(f"store_kv: slots {slots.tolist()} reach outside 0 to {num_slots - 1}.")
    block_size = k_cache_NBKD.shape[1]
    blocks, places = torch.div(slots, block_size, rounding_mode="floor"), slots % block_size
    k_cache_NBKD[blocks, places] = k_TKD[rows].to(k_cache_NBKD.dtype)
    v_cache_NBKD[blocks, places] = v_TKD[rows].to(v_cache_NBKD.dtype)


def _check_shapes(k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slots_T: Tensor) -> None:
    k, cache = tuple(k_TKD.shape), tuple(k_cache_NBKD.shape)
    check(len(k) == 3 and tuple(v_TKD.shape) == k, f"store_kv: k {k} and v {tuple(v_TKD.shape)} are not one [T, K, D].")
    check(
        len(cache) == 4 and tuple(v_cache_NBKD.shape) == cache and cache[2:] == k[1:],
        f"store_kv: caches {cache} and {tuple(v_cache_NBKD.shape)} are not one [N, B, {k[1]}, {k[2]}].",
    )
    check(k_cache_NBKD.dtype == v_cache_NBKD.dtype, "store_kv: the two caches differ in dtype.")
    check(
        tuple(slots_T.shape) == k[:1] and slots_T.dtype == torch.int64,
        f"store_kv: slot_mapping is {slots_T.dtype} {tuple(slots_T.shape)}, expected int64 [{k[0]}].",
    )
