"""Tokens drawn from logits, with both log-probabilities: one pass over the logits, and one tile of them again.

A row inverts its cumulative distribution at one counter-based random number (Philox4x32-10, Salmon et al. 2011), the
number that a CPU draws at: one a row, where the Gumbel trick takes one a logit. Sums over tiles are fp32, sums of tiles
and within the tile of the draw fp64.

Shapes: R rows, V vocabulary, S tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import HAS_TRITON, check, check_launchable, next_power_of_two

PADDING = -1.0
"""As a temperature: the row is not drawn, its token is 0."""

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def tile_stats_kernel(
        logits_ptr: tl.tensor,
        temperature_ptr: tl.tensor,
        top_ptr: tl.tensor,
        norm_ptr: tl.tensor,
        argmax_ptr: tl.tensor,
        row_stride: tl.tensor,
        num_tiles: tl.tensor,
        V: tl.tensor,
        TILE: tl.constexpr,
    ) -> None:
        """One program takes the maximum, its place and the sum of exponentials of one tile of one row."""
        row = tl.program_id(0).to(tl.int64)
        tile = tl.program_id(1)
        temperature = tl.load(temperature_ptr + row)
        if temperature < 0.0:
            return
        at = tile * TILE + tl.arange(0, TILE)
        mask = at < V
        x = tl.load(logits_ptr + row * row_stride + at, mask=mask, other=float("-inf")).to(tl.float32)
        x = x / tl.where(temperature > 0.0, temperature, 1.0)
        top = tl.max(x, axis=0)
        shift = tl.where(top == float("-inf"), 0.0, top)
        norm = tl.sum(tl.where(mask, tl.exp(x - shift), 0.0), axis=0)
        first = tl.min(tl.where(x == top, at, V), axis=0)
        tl.store(top_ptr + row * num_tiles + tile, top)
        tl.store(norm_ptr + row * num_tiles + tile, norm)
        tl.store(argmax_ptr + row * num_tiles + tile, first)

    @triton.jit
    def uniform(seed: tl.tensor, index: tl.tensor, position: tl.tensor) -> tl.tensor:
        """Return a number in [0, 1) with 53 random bits."""
        low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
        sample = (index & 0xFFFFFFFF).to(tl.uint32)
        w0, w1, _, _ = tl.philox(seed.to(tl.uint64, bitcast=True), low, high, sample, (sample * 0).to(tl.uint32))
        bits = (w0.to(tl.uint64) << 21) ^ (w1.to(tl.uint64) >> 11)
        return bits.to(tl.float64) * 1.1102230246251565e-16

    @triton.jit
    def draw_kernel(
        logits_ptr: tl.tensor,
        temperature_ptr: tl.tensor,
        seed_ptr: tl.tensor,
        index_ptr: tl.tensor,
        position_ptr: tl.tensor,
        top_ptr: tl.tensor,
        norm_ptr: tl.tensor,
        argmax_ptr: tl.tensor,
        token_ptr: tl.tensor,
        logprob_ptr: tl.tensor,
        sampling_ptr: tl.tensor,
        row_stride: tl.tensor,
        num_tiles: tl.tensor,
        V: tl.tensor,
        TILE: tl.constexpr,
        BLOCK_S: tl.constexpr,
    ) -> None:
        """One program merges the tiles of one row, finds the one that holds the draw, and draws from it."""
        row = tl.program_id(0).to(tl.int64)
        temperature = tl.load(temperature_ptr + row)
        if temperature < 0.0:
            tl.store(token_ptr + row, 0)
            tl.store(logprob_ptr + row, 0.0)
            tl.store(sampling_ptr + row, 0.0)
            return
        tiles = tl.arange(0, BLOCK_S)
        in_row = tiles < num_tiles
        tops = tl.load(top_ptr + row * num_tiles + tiles, mask=in_row, other=float("-inf"))
        norms = tl.load(norm_ptr + row * num_tiles + tiles, mask=in_row, other=0.0)
        top = tl.max(tops, axis=0)
        mass = tl.where(in_row, norms * tl.exp(tops - top), 0.0).to(tl.float64)
        total = tl.sum(mass, axis=0)
        log_total = tl.log(total.to(tl.float32))
        if temperature == 0.0:
            places = tl.load(argmax_ptr + row * num_tiles + tiles, mask=in_row, other=V)
            token = tl.min(tl.where(tops == top, places, V), axis=0)
            tl.store(token_ptr + row, tl.where(token < V, token, 0).to(tl.int64))
            tl.store(logprob_ptr + row, -log_total)
            tl.store(sampling_ptr + row, 0.0)
            return
        random = uniform(tl.load(seed_ptr + row), tl.load(index_ptr + row), tl.load(position_ptr + row))
        target = random * total
        # Rounding may carry the target past the end: then the last tile with any mass holds it.
        last_tile = tl.max(tl.where(mass > 0.0, tiles, 0), axis=0)
        tile = tl.minimum(tl.sum((tl.cumsum(mass, axis=0) <= target).to(tl.int32), axis=0), last_tile)
        before = tl.sum(tl.where(tiles < tile, mass, 0.0), axis=0)
        within = tl.arange(0, TILE)
        at = tile * TILE + within
        x = tl.load(logits_ptr + row * row_stride + at, mask=at < V, other=float("-inf")).to(tl.float32) / temperature
        weights = tl.exp(x - top).to(tl.float64)
        last = tl.max(tl.where(weights > 0.0, within, 0), axis=0)
        place = tl.minimum(tl.sum((before + tl.cumsum(weights, axis=0) <= target).to(tl.int32), axis=0), last)
        logprob = tl.sum(tl.where(within == place, x, 0.0), axis=0) - top - log_total
        tl.store(token_ptr + row, (tile * TILE + place).to(tl.int64))
        tl.store(logprob_ptr + row, logprob)
        tl.store(sampling_ptr + row, logprob)


def draw_config(vocab_size: int) -> dict[str, int]:
    """Return tile size and warps: a committed choice."""
    tile = min(4096, max(16, next_power_of_two(vocab_size)))
    return {"TILE": tile, "num_warps": 8 if tile > 1024 else 4}


def draw_tokens(
    logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, index_R: Tensor, position_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids (int64), log p under the softmax at the temperature, and log p under what was drawn from.

    Temperature 0 takes the most likely token, the first of equals, at log p 0 of the second kind; a negative one marks
    padding. Logits may be -inf; a row of -inf or with a NaN gets some token at log p NaN. Seeds hold 64 random bits as
    int64. Raises `ValueError` on shapes, dtypes or strides that do not fit.
    """
    _check(logits_RV, temperature_R, seed_R, index_R, position_R)
    check(logits_RV.stride(1) == 1 or logits_RV.shape[1] == 1, "draw_tokens: logits are not contiguous along V.")
    check_launchable("draw_tokens", logits_RV, temperature_R, seed_R, index_R, position_R)
    num_rows, vocab_size = logits_RV.shape
    device = logits_RV.device
    token_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprob_R, sampling_R = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(2))
    if num_rows == 0:
        return token_R, logprob_R, sampling_R
    config = draw_config(vocab_size)
    num_tiles = -(-vocab_size // config["TILE"])
    top_RS, norm_RS = (torch.empty((num_rows, num_tiles), dtype=torch.float32, device=device) for _ in range(2))
    argmax_RS = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=device)
    stats = top_RS, norm_RS, argmax_RS
    sizes = logits_RV.stride(0), num_tiles, vocab_size
    tile_stats_kernel[(num_rows, num_tiles)](logits_RV, temperature_R, *stats, *sizes, **config)
    draw_kernel[(num_rows,)](
        logits_RV,
        temperature_R,
        seed_R,
        index_R,
        position_R,
        *stats,
        token_R,
        logprob_R,
        sampling_R,
        *sizes,
        BLOCK_S=next_power_of_two(num_tiles),
        **config,
    )
    return token_R, logprob_R, sampling_R


def draw_tokens_reference(
    logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, index_R: Tensor, position_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `draw_tokens` does, on any device and without waiting for it."""
    _check(logits_RV, temperature_R, seed_R, index_R, position_R)
    temperature_R1 = torch.where(temperature_R > 0, temperature_R, 1.0)[:, None]
    logp_RV = torch.log_softmax(logits_RV.float() / temperature_R1, dim=-1)
    cdf_RV = logp_RV.exp().cumsum(-1, dtype=torch.float64)
    target_R1 = uniforms_reference(seed_R, index_R, position_R)[:, None] * cdf_RV[:, -1:]
    drawn_R1 = torch.searchsorted(cdf_RV, target_R1, right=True).clamp_(max=logits_RV.shape[1] - 1)
    greedy_R1, padding_R1 = (temperature_R == 0)[:, None], (temperature_R < 0)[:, None]
    token_R1 = torch.where(greedy_R1, logp_RV.argmax(-1, keepdim=True), drawn_R1).masked_fill_(padding_R1, 0)
    logprob_R1 = logp_RV.gather(1, token_R1).masked_fill_(padding_R1, 0.0)
    sampling_R1 = logprob_R1.masked_fill(greedy_R1, 0.0)
    return token_R1[:, 0], logprob_R1[:, 0], sampling_R1[:, 0]


def uniforms_reference(seed_R: Tensor, index_R: Tensor, position_R: Tensor) -> Tensor:
    """Return the rows' random numbers in [0, 1), float64, by 64-bit integer arithmetic."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = position_R & low, (position_R >> 32) & low, index_R & low, torch.zeros_like(index_R)
    k0, k1 = seed_R & low, (seed_R >> 32) & low
    for _ in range(10):
        (high0, low0), (high1, low1) = _wide_product(0xD2511F53, c0), _wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return ((c0 << 21) ^ (c1 >> 11)).double() * 2.0**-53


def _wide_product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a product of two 32-bit numbers, whose 64 bits do not fit into int64."""
    by_low, by_high = (factor & 0xFFFF) * x, (factor >> 16) * x
    middle = (by_low >> 16) + by_high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (by_low & 0xFFFF)


def _check(logits_RV: Tensor, temperature_R: Tensor, *integers: Tensor) -> None:
    shape = tuple(logits_RV.shape)
    check(len(shape) == 2 and shape[1] > 0, f"draw_tokens: logits {shape} are not [R, V] with at least one token.")
    check(
        tuple(temperature_R.shape) == shape[:1] and temperature_R.dtype == torch.float32,
        f"draw_tokens: temperature is {temperature_R.dtype} {tuple(temperature_R.shape)}, not float32 [{shape[0]}].",
    )
    for name, tensor in zip(("seed", "index", "position"), integers, strict=True):
        check(
            tuple(tensor.shape) == shape[:1] and tensor.dtype == torch.int64 and tensor.is_contiguous(),
            f"draw_tokens: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected contiguous int64 [{shape[0]}].",
        )
