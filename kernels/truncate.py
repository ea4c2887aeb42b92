"""Where top-k, top-p and min-p cut a row of logits, found by bisection instead of a sort.

What is kept of a row is one cut through its logits in descending order, equal ones in the order of ids: all above a
value, and of those equal to it the ones up to an id. The value is searched among the 32-bit integers that are ordered
as fp32 numbers are; each step counts, or weighs, what lies above.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import HAS_TRITON, next_power_of_two

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def ordered_key(logits: tl.tensor) -> tl.tensor:
        """Return int32 keys in the order of fp32 logits; both zeros have one key."""
        bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def is_kept(key: tl.tensor, ids: tl.tensor, cut: tl.tensor, last: tl.tensor) -> tl.tensor:
        """Return whether tokens lie above the cut, or at it with an id up to `last`."""
        return (key > cut) | ((key == cut) & (ids <= last))

    @triton.jit
    def _load(row_ptr: tl.tensor, first: tl.tensor, V: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
        ids = first + tl.arange(0, BLOCK)
        return tl.load(row_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)

    @triton.jit
    def _weights(logits: tl.tensor, highest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
        return tl.exp((logits - highest) / temperature)

    @triton.jit
    def _count_from(row_ptr: tl.tensor, cut: tl.tensor, V: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
        """Return how many logits have keys of at least `cut`."""
        count = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, V, BLOCK):
            inside = first + tl.arange(0, BLOCK) < V
            count += ((ordered_key(_load(row_ptr, first, V, BLOCK)) >= cut) & inside).to(tl.int32)
        return tl.sum(count, axis=0)

    @triton.jit
    def _weight_from(
        row_ptr: tl.tensor,
        cut: tl.tensor,
        highest: tl.tensor,
        temperature: tl.tensor,
        V: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> tl.tensor:
        """Return the weight of all logits with keys of at least `cut`; more of them never weigh less."""
        total = tl.zeros((), tl.float64)
        for first in range(0, V, BLOCK):
            logits = _load(row_ptr, first, V, BLOCK)
            weights = _weights(logits, highest, temperature)
            total += tl.sum(tl.where(ordered_key(logits) >= cut, weights, 0.0), axis=0).to(tl.float64)
        return total

    @triton.jit
    def _weight_at(
        row_ptr: tl.tensor,
        cut: tl.tensor,
        highest: tl.tensor,
        temperature: tl.tensor,
        V: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> tl.tensor:
        """Return the weight of one logit whose key is `cut`, 0 if there is none."""
        found = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, V, BLOCK):
            logits = _load(row_ptr, first, V, BLOCK)
            weights = _weights(logits, highest, temperature)
            found = tl.maximum(found, tl.where(ordered_key(logits) == cut, weights, 0.0))
        return tl.max(found, axis=0).to(tl.float64)

    @triton.jit
    def find_cuts_kernel(
        logits_ptr: tl.tensor,
        temperature_ptr: tl.tensor,
        top_k_ptr: tl.tensor,
        top_p_ptr: tl.tensor,
        min_p_ptr: tl.tensor,
        cut_ptr: tl.tensor,
        last_ptr: tl.tensor,
        logits_stride: tl.tensor,
        HAS_TOP_K: tl.constexpr,
        HAS_TOP_P: tl.constexpr,
        HAS_MIN_P: tl.constexpr,
        V: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        """One program cuts one row. Between `low` and `high` lies the largest key that still keeps enough."""
        row = tl.program_id(0).to(tl.int64)
        temperature = tl.load(temperature_ptr + row)
        lowest = -(2**31)
        cut, num_equal = tl.full((), lowest, tl.int64), tl.full((), V, tl.int64)
        tl.store(cut_ptr + row, cut.to(tl.int32))
        tl.store(last_ptr + row, V)
        if temperature <= 0.0:
            return
        row_ptr = logits_ptr + row * logits_stride
        highest_B = tl.full((BLOCK,), float("-inf"), tl.float32)
        for first in range(0, V, BLOCK):
            highest_B = tl.maximum(highest_B, _load(row_ptr, first, V, BLOCK))
        highest = tl.max(highest_B, axis=0)
        highest_key = ordered_key(highest).to(tl.int64)
        highest = tl.where(highest == float("-inf"), 0.0, highest)

        if HAS_TOP_K:
            top_k = tl.load(top_k_ptr + row)
            if (top_k > 0) & (top_k < V):
                low, high = cut, highest_key
                while low < high:
                    middle = high - (high - low) // 2
                    enough = _count_from(row_ptr, middle.to(tl.int32), V, BLOCK) >= top_k
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle - 1)
                cut = low
                num_equal = top_k - _count_from(row_ptr, (cut + 1).to(tl.int32), V, BLOCK)

        if HAS_TOP_P:
            top_p = tl.load(top_p_ptr + row).to(tl.float64)
            if top_p < 1.0:
                above = _weight_from(row_ptr, (cut + 1).to(tl.int32), highest, temperature, V, BLOCK)
                each = _weight_at(row_ptr, cut.to(tl.int32), highest, temperature, V, BLOCK)
                wanted = top_p * (above + num_equal.to(tl.float64) * each)
                low, high = cut, highest_key
                while low < high:
                    middle = high - (high - low) // 2
                    weight = _weight_from(row_ptr, middle.to(tl.int32), highest, temperature, V, BLOCK)
                    low = tl.where(weight >= wanted, middle, low)
                    high = tl.where(weight >= wanted, high, middle - 1)
                above = _weight_from(row_ptr, (low + 1).to(tl.int32), highest, temperature, V, BLOCK)
                each = _weight_at(row_ptr, low.to(tl.int32), highest, temperature, V, BLOCK)
                number = tl.ceil((wanted - above) / tl.where(each > 0.0, each, 1.0))
                number = tl.minimum(tl.maximum(number, 1.0), V).to(tl.int64)
                num_equal = tl.where(low == cut, tl.minimum(number, num_equal), number)
                cut = low

        if HAS_MIN_P:
            min_p = tl.load(min_p_ptr + row)
            if min_p > 0.0:
                least_B = tl.full((BLOCK,), 2**31 - 1, tl.int32)
                for first in range(0, V, BLOCK):
                    logits = _load(row_ptr, first, V, BLOCK)
                    likely = (logits - highest) / temperature >= tl.log(min_p)
                    least_B = tl.minimum(least_B, tl.where(likely, ordered_key(logits), 2**31 - 1))
                least = tl.min(least_B, axis=0).to(tl.int64)
                least = tl.minimum(least, highest_key)
                num_equal = tl.where(least > cut, V, num_equal)
                cut = tl.maximum(cut, least)

        tl.store(cut_ptr + row, cut.to(tl.int32))
        if num_equal < V:
            found = tl.full((), V, tl.int32)
            seen = tl.zeros((), tl.int32)
            for first in range(0, V, BLOCK):
                ids = first + tl.arange(0, BLOCK)
                equal = (ordered_key(_load(row_ptr, first, V, BLOCK)) == cut.to(tl.int32)) & (ids < V)
                place = seen + tl.cumsum(equal.to(tl.int32), axis=0)
                found = tl.minimum(found, tl.min(tl.where(equal & (place == num_equal), ids, V), axis=0))
                seen += tl.sum(equal.to(tl.int32), axis=0)
            tl.store(last_ptr + row, found)


def find_cuts(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor | None,
    top_p_R: Tensor | None,
    min_p_R: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return (key, id) int32 [R]: kept are logits whose key is larger, and those of this key with ids up to this one.

    Arguments as `draw_tokens`, which has checked them. Rows of a temperature of 0 or less are kept whole.
    """
    num_rows, vocab_size = logits_RV.shape
    cut_R, last_R = torch.empty((2, num_rows), dtype=torch.int32, device=logits_RV.device).unbind()
    block = truncate_config(vocab_size)
    find_cuts_kernel[(num_rows,)](
        logits_RV,
        temperature_R,
        temperature_R if top_k_R is None else top_k_R,
        temperature_R if top_p_R is None else top_p_R,
        temperature_R if min_p_R is None else min_p_R,
        cut_R,
        last_R,
        logits_RV.stride(0),
        HAS_TOP_K=top_k_R is not None,
        HAS_TOP_P=top_p_R is not None,
        HAS_MIN_P=min_p_R is not None,
        V=vocab_size,
        BLOCK=block,
        num_warps=max(1, min(16, block // 256)),
        enable_fp_fusion=False,
    )
    return cut_R, last_R


def truncate_config(vocab_size: int) -> int:
    """Return how many logits a program reads at a time."""
    return min(4096, max(32, next_power_of_two(vocab_size) // 4))


def truncate_reference(
    logits_RV: Tensor, logp_RV: Tensor, top_k_R: Tensor | None, top_p_R: Tensor | None, min_p_R: Tensor | None
) -> Tensor:
    """Return `logp_RV`, the log-softmax of scaled `logits_RV`, with -inf outside of what is kept, on any device.

    top-p keeps the most likely tokens until their share reaches p (Holtzman et al. 2020); min-p keeps what is at
    least that fraction as likely as the most likely token (Nguyen et al. 2024).
    """
    order_RV = logits_RV.sort(dim=-1, descending=True, stable=True).indices
    sorted_RV = logp_RV.gather(1, order_RV)
    keep_RV = torch.ones_like(sorted_RV, dtype=torch.bool)
    if top_k_R is not None:
        rank_V = torch.arange(logp_RV.shape[1], device=logp_RV.device)
        keep_RV &= (rank_V < top_k_R[:, None]) | (top_k_R[:, None] <= 0)
    if top_p_R is not None:
        probs_RV = sorted_RV.double().exp().masked_fill(~keep_RV, 0.0)
        up_to_RV = probs_RV.cumsum(-1)
        top_p_R1 = top_p_R.double()[:, None]
        # Not `sum`, whose order depends on the number of rows: a single long row is cut between threads.
        # top_p=1 keeps everything whatever the rounding of the sum.
        keep_RV &= (up_to_RV - probs_RV < top_p_R1 * up_to_RV[:, -1:]) | (top_p_R1 >= 1.0)
    if min_p_R is not None:
        keep_RV &= sorted_RV >= sorted_RV[:, :1] + min_p_R[:, None].log()
    return torch.full_like(logp_RV, float("-inf")).scatter(1, order_RV, sorted_RV.masked_fill(~keep_RV, float("-inf")))
