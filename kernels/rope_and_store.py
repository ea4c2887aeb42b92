"""Between projection and attention, in one launch: norms of single heads, rotary positions, keys and values stored.

Su et al. 2021 in transformers' layout: dimension d of the first half turns with d of the second. Rounding points are
those of the torch operations that transformers runs. Shapes: T rows, H query heads, K kv heads, D head dim, R rotated
dimensions, N blocks, B block size, P positions of the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import TailAdapters, adapted_reference, check_adapters
from .launch import HAS_TRITON, check, check_launchable, next_power_of_two

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .adapters import adapted

    @triton.jit
    def weighed(
        x: tl.tensor,
        scale: tl.tensor,
        weight_at: tl.tensor,
        mask: tl.tensor,
        raw: tl.constexpr,
        dtype: tl.constexpr,
        OFFSET: tl.constexpr,
        ROUNDS_LAST: tl.constexpr,
    ) -> tl.tensor:
        """Return x * scale, times a norm's weight, rounded to `raw` before it or to `dtype` after it; all in fp32."""
        weight = tl.load(weight_at, mask=mask, other=0.0).to(tl.float32)
        if ROUNDS_LAST:
            return (x * scale * (OFFSET + weight)).to(dtype).to(tl.float32)
        return (weight * (x * scale).to(raw).to(tl.float32)).to(dtype).to(tl.float32)

    @triton.jit
    def rotated(
        x: tl.tensor,
        other: tl.tensor,
        cos_at: tl.tensor,
        sin_at: tl.tensor,
        dims: tl.tensor,
        R: tl.constexpr,
        ANGLE: tl.constexpr,
        ROTATED: tl.constexpr,
    ) -> tl.tensor:
        """Return a head whose first R dimensions have turned with their partners' values `other`."""
        turns = dims < R
        cos = tl.load(cos_at + dims, mask=turns, other=1.0).to(ANGLE).to(tl.float32)
        sin = tl.load(sin_at + dims, mask=turns, other=0.0).to(ANGLE).to(tl.float32)
        other = tl.where(dims < R // 2, -other, other)
        straight = (x * cos).to(ROTATED).to(tl.float32)
        across = (other * sin).to(ROTATED).to(tl.float32)
        return tl.where(turns, (straight + across).to(ROTATED).to(tl.float32), x)

    @triton.jit
    def rope_and_store_kernel(
        q_ptr: tl.tensor,
        k_ptr: tl.tensor,
        v_ptr: tl.tensor,
        q_norm_ptr: tl.tensor,
        k_norm_ptr: tl.tensor,
        cos_ptr: tl.tensor,
        sin_ptr: tl.tensor,
        position_ptr: tl.tensor,
        slot_ptr: tl.tensor,
        out_ptr: tl.tensor,
        k_cache_ptr: tl.tensor,
        v_cache_ptr: tl.tensor,
        tail_ptr: tl.tensor,
        b_ptr: tl.tensor,
        q_stride: tl.tensor,
        k_stride: tl.tensor,
        v_stride: tl.tensor,
        table_stride: tl.tensor,
        out_stride: tl.tensor,
        k_cache_stride_n: tl.tensor,
        k_cache_stride_b: tl.tensor,
        k_cache_stride_k: tl.tensor,
        v_cache_stride_n: tl.tensor,
        v_cache_stride_b: tl.tensor,
        v_cache_stride_k: tl.tensor,
        num_stored: tl.tensor,
        num_slots: tl.tensor,
        eps: tl.tensor,
        tail_stride: tl.tensor,
        q_column: tl.tensor,
        k_column: tl.tensor,
        v_column: tl.tensor,
        q_scaling: tl.tensor,
        k_scaling: tl.tensor,
        v_scaling: tl.tensor,
        H: tl.constexpr,
        K: tl.constexpr,
        D: tl.constexpr,
        R: tl.constexpr,
        B: tl.constexpr,
        HAS_NORM: tl.constexpr,
        OFFSET: tl.constexpr,
        NORM_ROUNDS_LAST: tl.constexpr,
        ROPE_ROUNDS_LAST: tl.constexpr,
        NORMED: tl.constexpr,
        ANGLE: tl.constexpr,
        ROTATED: tl.constexpr,
        RANK: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ) -> None:
        """One program does one head of one row: queries first, then keys, then values; adapters (RANK > 0) before."""
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1).to(tl.int64)
        dims = tl.arange(0, BLOCK_D)
        mask = dims < D
        slot = tl.load(slot_ptr + row, mask=row < num_stored, other=-1).to(tl.int64)
        slots = slot + dims * 0
        stored = mask & (slots >= 0) & (slots < num_slots)
        raw: tl.constexpr = q_ptr.dtype.element_ty
        N: tl.constexpr = (H + 2 * K) * D
        tail_at, b_at = tail_ptr + row * tail_stride, b_ptr + head * D
        block, place = slot // B, slot % B
        if head >= H + K:
            v_head = head - H - K
            v = tl.load(v_ptr + row * v_stride + v_head * D + dims, mask=mask, other=0.0)
            if RANK > 0:
                v = adapted(v.to(tl.float32), tail_at + v_column, b_at + dims, mask, N, v_scaling, raw, RANK)
            v_at = block * v_cache_stride_n + place * v_cache_stride_b + v_head * v_cache_stride_k + dims
            tl.store(v_cache_ptr + v_at, v.to(v_cache_ptr.dtype.element_ty), mask=stored)
            return
        is_query = head < H
        if is_query:
            source, weights = q_ptr + row * q_stride + head * D, q_norm_ptr
            column, scaling = q_column, q_scaling
        else:
            source, weights = k_ptr + row * k_stride + (head - H) * D, k_norm_ptr
            column, scaling = k_column, k_scaling
        x = tl.load(source + dims, mask=mask, other=0.0).to(tl.float32)
        # The dimension that each one turns with; beyond R none does.
        partner = tl.where(dims < R // 2, dims + R // 2, dims - R // 2)
        turns = dims < R
        other = tl.load(source + partner, mask=turns, other=0.0).to(tl.float32)
        if RANK > 0:
            x = adapted(x, tail_at + column, b_at + dims, mask, N, scaling, raw, RANK)
            other = adapted(other, tail_at + column, b_at + partner, turns, N, scaling, raw, RANK)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
            x = weighed(x, scale, weights + dims, mask, raw, NORMED, OFFSET, NORM_ROUNDS_LAST)
            other = weighed(other, scale, weights + partner, turns, raw, NORMED, OFFSET, NORM_ROUNDS_LAST)
        if R > 0:
            at = tl.load(position_ptr + row).to(tl.int64) * table_stride
            x = rotated(x, other, cos_ptr + at, sin_ptr + at, dims, R, ANGLE, ROTATED)
            if ROPE_ROUNDS_LAST:
                x = x.to(NORMED).to(tl.float32)
        if is_query:
            tl.store(out_ptr + row * out_stride + head * D + dims, x.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            k_at = block * k_cache_stride_n + place * k_cache_stride_b + (head - H) * k_cache_stride_k + dims
            tl.store(k_cache_ptr + k_at, x.to(k_cache_ptr.dtype.element_ty), mask=stored)

    _TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Rope:
    """Rotary tables [P, 1, R] in fp32, and the dtype that cos and sin are rounded to."""

    cos: Tensor
    sin: Tensor
    dtype: torch.dtype
    rounds_last: bool = False
    """Rotated heads are rounded back to the dtype that they had before."""


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of each head of queries and keys, [D] each; `offset` and `rounds_last` as in `rms_norm`."""

    q: Tensor
    k: Tensor
    eps: float
    offset: float = 0.0
    rounds_last: bool = False


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_T: Tensor,
    slots: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    *,
    norms: HeadNorms | None = None,
    rope: Rope | None = None,
    adapters: TailAdapters | None = None,
) -> Tensor:
    """Return queries [T, H, D] in the cache's dtype; row t's keys and values go to slot `slots[t]`, -1 skips it.

    q [T, H * D], k and v [T, K * D] are of one dtype, their rows may be strided. Rows beyond the end of `slots` are not
    stored; a slot outside the pool writes nothing. `adapters` are those of q, k and v, whose columns B has side by
    side. Raises `ValueError` on shapes, dtypes or strides that do not fit.
    """
    _check(q, k, v, positions_T, slots, k_cache_NBKD, v_cache_NBKD, norms, rope)
    if adapters is not None:
        check_adapters("rope_and_store", adapters, q, k, v)
    check_launchable("rope_and_store", q, k, v, positions_T, slots, k_cache_NBKD, v_cache_NBKD)
    num_rows, (num_blocks, block_size, num_kv_heads, head_dim) = q.shape[0], k_cache_NBKD.shape
    num_heads = q.shape[1] // head_dim
    out_THD = torch.empty((num_rows, num_heads, head_dim), dtype=k_cache_NBKD.dtype, device=q.device)
    if num_rows == 0:
        return out_THD
    normed = q.dtype
    if norms is not None and not norms.rounds_last:
        normed = torch.promote_types(q.dtype, norms.q.dtype)
    angle = normed if rope is None else rope.dtype
    rope_and_store_kernel[(num_rows, num_heads + 2 * num_kv_heads)](
        q,
        k,
        v,
        q if norms is None else norms.q,
        k if norms is None else norms.k,
        q if rope is None else rope.cos,
        q if rope is None else rope.sin,
        positions_T,
        slots,
        out_THD,
        k_cache_NBKD,
        v_cache_NBKD,
        q if adapters is None else adapters.tail_TC,
        q if adapters is None else adapters.b_rN,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        0 if rope is None else rope.cos.stride(0),
        out_THD.stride(0),
        *k_cache_NBKD.stride()[:3],
        *v_cache_NBKD.stride()[:3],
        slots.shape[0],
        num_blocks * block_size,
        0.0 if norms is None else norms.eps,
        0 if adapters is None else adapters.tail_TC.stride(0),
        *((0, 0, 0) if adapters is None else adapters.columns),
        *((0.0, 0.0, 0.0) if adapters is None else adapters.scalings),
        H=num_heads,
        K=num_kv_heads,
        D=head_dim,
        R=0 if rope is None else rope.cos.shape[-1],
        B=block_size,
        HAS_NORM=norms is not None,
        OFFSET=0.0 if norms is None else norms.offset,
        NORM_ROUNDS_LAST=norms is not None and norms.rounds_last,
        ROPE_ROUNDS_LAST=rope is not None and rope.rounds_last,
        NORMED=_TRITON[normed],
        ANGLE=_TRITON[angle],
        ROTATED=_TRITON[torch.promote_types(normed, angle)],
        RANK=0 if adapters is None else adapters.rank,
        enable_fp_fusion=False,
        **rope_and_store_config(head_dim),
    )
    return out_THD


def rope_and_store_config(head_dim: int) -> dict[str, int]:
    """Return tile size and warps: a committed choice."""
    return {"BLOCK_D": next_power_of_two(head_dim), "num_warps": 1}


def rope_and_store_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_T: Tensor,
    slots: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    *,
    norms: HeadNorms | None = None,
    rope: Rope | None = None,
    adapters: TailAdapters | None = None,
) -> Tensor:
    """Do what `rope_and_store` does, in the operations of transformers."""
    _check(q, k, v, positions_T, slots, k_cache_NBKD, v_cache_NBKD, norms, rope)
    head_dim, dtype = k_cache_NBKD.shape[3], k_cache_NBKD.dtype
    sizes = [q.shape[1], k.shape[1], v.shape[1]]
    q, k, v = torch.split(adapted_reference(torch.cat((q, k, v), dim=1), adapters, sizes), sizes, dim=1)
    q_THD, k_TKD, v_TKD = (part.reshape(part.shape[0], -1, head_dim) for part in (q, k, v))
    if norms is not None:
        q_THD, k_TKD = _norm(q_THD, norms.q, norms), _norm(k_TKD, norms.k, norms)
    if rope is not None:
        q_THD, k_TKD = _rotate(q_THD, positions_T, rope), _rotate(k_TKD, positions_T, rope)
    num_slots = k_cache_NBKD.shape[0] * k_cache_NBKD.shape[1]
    rows = ((slots >= 0) & (slots < num_slots)).nonzero()[:, 0]
    at = torch.div(slots[rows], k_cache_NBKD.shape[1], rounding_mode="floor"), slots[rows] % k_cache_NBKD.shape[1]
    k_cache_NBKD[at] = k_TKD[rows].to(dtype)
    v_cache_NBKD[at] = v_TKD[rows].to(dtype)
    return q_THD.to(dtype)


def _norm(x_THD: Tensor, weight_D: Tensor, norms: HeadNorms) -> Tensor:
    x32_THD = x_THD.float()
    x32_THD = x32_THD * torch.rsqrt(x32_THD.pow(2).mean(-1, keepdim=True) + norms.eps)
    if norms.rounds_last:
        return (x32_THD * (norms.offset + weight_D.float())).to(x_THD.dtype)
    return weight_D * x32_THD.to(x_THD.dtype)


def _rotate(x_THD: Tensor, positions_T: Tensor, rope: Rope) -> Tensor:
    cos_T1R, sin_T1R = rope.cos[positions_T].to(rope.dtype), rope.sin[positions_T].to(rope.dtype)
    rotary_dim = cos_T1R.shape[-1]
    x_THR = x_THD[..., :rotary_dim]
    first, second = x_THR.chunk(2, dim=-1)
    turned_THR = x_THR * cos_T1R + torch.cat((-second, first), dim=-1) * sin_T1R
    turned_THD = torch.cat((turned_THR, x_THD[..., rotary_dim:].to(turned_THR.dtype)), dim=-1)
    return turned_THD.to(x_THD.dtype) if rope.rounds_last else turned_THD


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_T: Tensor,
    slots: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    norms: HeadNorms | None,
    rope: Rope | None,
) -> None:
    cache = tuple(k_cache_NBKD.shape)
    check(
        len(cache) == 4 and tuple(v_cache_NBKD.shape) == cache and k_cache_NBKD.dtype == v_cache_NBKD.dtype,
        f"rope_and_store: caches {cache} and {tuple(v_cache_NBKD.shape)} are not one [N, B, K, D] of one dtype.",
    )
    num_rows, width, head_dim = q.shape[0], cache[2] * cache[3], cache[3]
    check(
        q.ndim == 2 and q.shape[1] > 0 and q.shape[1] % head_dim == 0,
        f"rope_and_store: q {tuple(q.shape)} is not [T, H * {head_dim}].",
    )
    for name, tensor in (("k", k), ("v", v)):
        shape = tuple(tensor.shape)
        check(shape == (num_rows, width), f"rope_and_store: {name} {shape} is not [{num_rows}, {width}].")
        check(tensor.dtype == q.dtype, f"rope_and_store: {name} is {tensor.dtype}, q is {q.dtype}.")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache_NBKD), ("v_cache", v_cache_NBKD)):
        check(tensor.stride(-1) == 1 or tensor.shape[-1] == 1, f"rope_and_store: {name} is not contiguous at the end.")
    check(
        tuple(positions_T.shape) == (num_rows,) and slots.ndim == 1 and slots.shape[0] <= num_rows,
        f"rope_and_store: positions {tuple(positions_T.shape)}, slots {tuple(slots.shape)} are not [{num_rows}] and "
        "as long or shorter.",
    )
    if norms is not None:
        both = tuple(norms.q.shape) == tuple(norms.k.shape) == (head_dim,) and norms.q.dtype == norms.k.dtype
        check(both, f"rope_and_store: norms {tuple(norms.q.shape)}, {tuple(norms.k.shape)} are not [{head_dim}] twice.")
    if rope is not None:
        table, rotary_dim = tuple(rope.cos.shape), rope.cos.shape[-1]
        check(
            tuple(rope.sin.shape) == table and len(table) == 3 and table[1] == 1 and rope.cos.is_contiguous(),
            f"rope_and_store: cos {table} and sin {tuple(rope.sin.shape)} are not one contiguous [P, 1, R].",
        )
        check(
            rotary_dim % 2 == 0 and rotary_dim <= head_dim and rope.sin.is_contiguous(),
            f"rope_and_store: {rotary_dim} rotated dimensions of {head_dim}; an even number, at most all.",
        )
