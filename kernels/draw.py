"""Draw one token a row from logits, and both its log-probabilities, without a sort and without a word to the host.

A row is drawn by inverting its cumulative distribution at one Philox4x32-10 number (Salmon et al., SC 2011), so a draw
is a function of the row, its seed, sample index and position only. The first launch reads the logits once and leaves
each tile's maximum and sum of exponentials; the second picks a tile by these and reads that tile again. Tiles depend on
the vocabulary size alone, and so do a row's bits.

Shapes: R rows, V vocabulary, N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import HAS_TRITON, check, check_launchable, next_power_of_two
from .truncate import find_cuts, truncate_reference

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .truncate import is_kept, ordered_key

    @triton.jit
    def uniform(seed: tl.tensor, index: tl.tensor, position: tl.tensor) -> tl.tensor:
        """Return a float64 in [0, 1) with 53 random bits; the arguments are the bits of uint64."""
        low = tl.full((), 0xFFFFFFFF, tl.uint64)
        seed, index, position = seed.to(tl.uint64), index.to(tl.uint64), position.to(tl.uint64)
        c0, c1, c2, c3 = position & low, position >> 32, index & low, tl.zeros((), tl.uint64)
        k0, k1 = seed & low, seed >> 32
        for _ in tl.static_range(10):
            p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
            c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
            k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
        bits = (c0 << 21) ^ (c1 >> 11)
        return bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2**-53

    @triton.jit
    def tile_statistics_kernel(
        logits_ptr: tl.tensor,
        temperature_ptr: tl.tensor,
        cut_ptr: tl.tensor,
        last_ptr: tl.tensor,
        max_ptr: tl.tensor,
        sum_ptr: tl.tensor,
        kept_ptr: tl.tensor,
        logits_stride: tl.tensor,
        V: tl.constexpr,
        N: tl.constexpr,
        BLOCK_V: tl.constexpr,
        TRUNCATED: tl.constexpr,
    ) -> None:
        """One program reads one tile of one row. Sums are relative to the tile's maximum, of -inf to 0."""
        row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
        temperature = tl.load(temperature_ptr + row)
        if temperature < 0.0:
            return
        temperature = tl.where(temperature == 0.0, 1.0, temperature)
        ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        highest = tl.max(logits, axis=0)
        weights = tl.exp((logits - tl.where(highest == float("-inf"), 0.0, highest)) / temperature)
        tl.store(max_ptr + row * N + tile, highest)
        tl.store(sum_ptr + row * N + tile, tl.sum(weights, axis=0))
        if TRUNCATED:
            kept = is_kept(ordered_key(logits), ids, tl.load(cut_ptr + row), tl.load(last_ptr + row))
            tl.store(kept_ptr + row * N + tile, tl.sum(tl.where(kept, weights, 0.0), axis=0))

    @triton.jit
    def first_beyond(weights: tl.tensor, target: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
        """Return the first place whose cumulative weight exceeds `target`; never one of no weight if any has one.

        A scan in a tree is not monotone to the last bit, so the places of no weight are excluded by name.
        """
        places = tl.arange(0, BLOCK)
        beyond = (tl.cumsum(weights, axis=0) > target) & (weights > 0.0)
        first = tl.min(tl.where(beyond, places, BLOCK), axis=0)
        last = tl.max(tl.where(weights > 0.0, places, 0), axis=0)
        return tl.where(first < BLOCK, first, last)

    @triton.jit
    def draw_from_tiles_kernel(
        logits_ptr: tl.tensor,
        temperature_ptr: tl.tensor,
        seed_ptr: tl.tensor,
        index_ptr: tl.tensor,
        position_ptr: tl.tensor,
        cut_ptr: tl.tensor,
        last_ptr: tl.tensor,
        max_ptr: tl.tensor,
        sum_ptr: tl.tensor,
        kept_ptr: tl.tensor,
        token_ptr: tl.tensor,
        logprob_ptr: tl.tensor,
        sampling_logprob_ptr: tl.tensor,
        logits_stride: tl.tensor,
        V: tl.constexpr,
        N: tl.constexpr,
        BLOCK_V: tl.constexpr,
        BLOCK_N: tl.constexpr,
        TRUNCATED: tl.constexpr,
    ) -> None:
        """One program draws one row. What is one number a row is float64; weights are relative to the row's maximum."""
        row = tl.program_id(0).to(tl.int64)
        temperature = tl.load(temperature_ptr + row)
        if temperature < 0.0:
            tl.store(token_ptr + row, tl.zeros((), tl.int64))
            tl.store(logprob_ptr + row, 0.0)
            tl.store(sampling_logprob_ptr + row, 0.0)
            return
        greedy = temperature == 0.0
        temperature = tl.where(greedy, 1.0, temperature)
        tiles = tl.arange(0, BLOCK_N)
        highest_N = tl.load(max_ptr + row * N + tiles, mask=tiles < N, other=float("-inf"))
        highest = tl.max(highest_N, axis=0)
        scale_N = tl.exp((highest_N - tl.where(highest == float("-inf"), 0.0, highest)) / temperature).to(tl.float64)
        total_N = tl.load(sum_ptr + row * N + tiles, mask=tiles < N, other=0.0).to(tl.float64) * scale_N
        weight_N = total_N
        if TRUNCATED:
            weight_N = tl.load(kept_ptr + row * N + tiles, mask=tiles < N, other=0.0).to(tl.float64) * scale_N
        total, kept_total = tl.sum(total_N, axis=0), tl.sum(weight_N, axis=0)
        seed, index = tl.load(seed_ptr + row).to(tl.int64), tl.load(index_ptr + row).to(tl.int64)
        target = uniform(seed, index, tl.load(position_ptr + row).to(tl.int64)) * kept_total
        greedy_tile = tl.min(tl.where(highest_N == highest, tiles, N - 1), axis=0)
        tile = tl.where(greedy, greedy_tile, tl.minimum(first_beyond(weight_N, target, BLOCK_N), N - 1))

        # The tile's weights add up to something else by rounding: the target keeps its share of the tile.
        before = tl.sum(tl.where(tiles < tile, weight_N, 0.0), axis=0)
        share = (target - before) / tl.sum(tl.where(tiles == tile, weight_N, 0.0), axis=0)
        ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        tile_highest = tl.max(tl.where(tiles == tile, highest_N, float("-inf")), axis=0)
        weights = tl.exp((logits - tl.where(tile_highest == float("-inf"), 0.0, tile_highest)) / temperature)
        if TRUNCATED:
            kept = is_kept(ordered_key(logits), ids, tl.load(cut_ptr + row), tl.load(last_ptr + row))
            weights = tl.where(kept, weights, 0.0)
        weights64 = weights.to(tl.float64)
        drawn = tile * BLOCK_V + first_beyond(weights64, share * tl.sum(weights64, axis=0), BLOCK_V)
        best = tl.min(tl.where(logits == highest, ids, V - 1), axis=0)
        token = tl.where(greedy, best, drawn)
        logit = tl.max(tl.where(ids == token, logits, float("-inf")), axis=0)
        z = ((logit - highest) / temperature).to(tl.float64)

        sound = total > 0.0  # not of NaN, which a NaN or +inf logit leaves
        nan = float("nan")
        sampling = tl.where(greedy, 0.0, z - tl.log(kept_total))
        tl.store(token_ptr + row, tl.where(sound, token, 0).to(tl.int64))
        tl.store(logprob_ptr + row, tl.where(sound, z - tl.log(total), nan).to(tl.float32))
        tl.store(sampling_logprob_ptr + row, tl.where(sound, sampling, nan).to(tl.float32))


@dataclass(frozen=True)
class DrawConfig:
    """Sizes of a launch."""

    block_v: int
    num_tiles: int
    num_warps: int
    """Of the second launch twice as many: its scan holds float64."""


def draw_config(vocab_size: int) -> DrawConfig:
    """Return the tiles of a vocabulary: 32 to 64 of them, which one program merges and one row spreads over the GPU."""
    block_v = max(32, next_power_of_two(-(-vocab_size // 64)))
    return DrawConfig(block_v, -(-vocab_size // block_v), 8 if block_v >= 2048 else 4)


def draw_from_tiles(
    logits_RV: Tensor,
    rows: tuple[Tensor, ...],
    cuts: tuple[Tensor, Tensor] | None,
    statistics_RN: tuple[Tensor, ...],
    config: DrawConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `draw_tokens` returns, from each tile's maximum, sum, and sum of what is kept (not read if no cuts).

    `rows` are temperature, seed, index and position.
    """
    (num_rows, vocab_size), device = logits_RV.shape, logits_RV.device
    token_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprob_R, sampling_logprob_R = torch.empty((2, num_rows), dtype=torch.float32, device=device).unbind()
    if num_rows:
        draw_from_tiles_kernel[(num_rows,)](
            logits_RV,
            *rows,
            *(cuts or (token_R, token_R)),
            *statistics_RN,
            token_R,
            logprob_R,
            sampling_logprob_R,
            logits_RV.stride(0),
            V=vocab_size,
            N=config.num_tiles,
            BLOCK_V=config.block_v,
            BLOCK_N=next_power_of_two(config.num_tiles),
            TRUNCATED=cuts is not None,
            num_warps=2 * config.num_warps,
            enable_fp_fusion=False,
        )
    return token_R, logprob_R, sampling_logprob_R


def draw_tokens(
    logits_RV: Tensor,
    temperature_R: Tensor,
    seed_R: Tensor,
    index_R: Tensor,
    position_R: Tensor,
    *,
    top_k_R: Tensor | None = None,
    top_p_R: Tensor | None = None,
    min_p_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (token int64, log p at this temperature, log p under what the token was drawn from), [R] each.

    Temperature 0 takes the first of the largest logits, its second log-probability is 0; a negative one marks padding:
    token 0, zeros, its logits are not read. Seed, index and position are int64 with the bits of uint64, of the index
    the lower half. Order: temperature, top-k (0 or >= V: off), top-p of what top-k kept (>= 1: off), min-p (0: off);
    equal logits keep the order of ids. A row with NaN or +inf, or with nothing but -inf, gives token 0 and two NaN.
    Changes nothing, allocates by shape alone, never waits for the device.
    """
    rows = (temperature_R, seed_R, index_R, position_R)
    cuts = (top_k_R, top_p_R, min_p_R)
    _check_rows(logits_RV, rows, cuts)
    num_rows, vocab_size = logits_RV.shape
    check(logits_RV.stride(1) == 1 or vocab_size == 1, "draw_tokens: logits are not contiguous along V.")
    check_launchable("draw_tokens", logits_RV, *rows, *(cut for cut in cuts if cut is not None))
    device, config = logits_RV.device, draw_config(vocab_size)
    statistics = torch.empty((3, num_rows, config.num_tiles), dtype=torch.float32, device=device).unbind()
    truncated = any(cut is not None for cut in cuts)
    cut_R, last_R = index_R, index_R  # not read
    if num_rows == 0:
        return draw_from_tiles(logits_RV, rows, None, statistics, config)
    if truncated:
        cut_R, last_R = find_cuts(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R)
    tile_statistics_kernel[(num_rows, config.num_tiles)](
        logits_RV,
        temperature_R,
        cut_R,
        last_R,
        *statistics,
        logits_RV.stride(0),
        V=vocab_size,
        N=config.num_tiles,
        BLOCK_V=config.block_v,
        TRUNCATED=truncated,
        num_warps=config.num_warps,
        enable_fp_fusion=False,  # triton's own default differs by version, and with it last bits
    )
    return draw_from_tiles(logits_RV, rows, (cut_R, last_R) if truncated else None, statistics, config)


def draw_tokens_reference(
    logits_RV: Tensor,
    temperature_R: Tensor,
    seed_R: Tensor,
    index_R: Tensor,
    position_R: Tensor,
    *,
    top_k_R: Tensor | None = None,
    top_p_R: Tensor | None = None,
    min_p_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `draw_tokens` does, on any device; its sums are sequential and float64."""
    _check_rows(logits_RV, (temperature_R, seed_R, index_R, position_R), (top_k_R, top_p_R, min_p_R))
    logits_RV = logits_RV.float()
    divisor_R1 = torch.where(temperature_R > 0, temperature_R, 1.0)[:, None]
    full_RV = torch.log_softmax(logits_RV / divisor_R1, dim=-1)
    drawn_RV = full_RV
    if top_k_R is not None or top_p_R is not None or min_p_R is not None:
        drawn_RV = torch.log_softmax(truncate_reference(logits_RV, full_RV, top_k_R, top_p_R, min_p_R), dim=-1)
    cdf_RV = drawn_RV.exp().cumsum(-1, dtype=torch.float64)
    target_R1 = uniforms(seed_R, index_R, position_R)[:, None] * cdf_RV[:, -1:]
    token_R1 = torch.searchsorted(cdf_RV, target_R1, right=True).clamp_(max=logits_RV.shape[1] - 1)
    if logits_RV.device.type != "cpu" or bool((temperature_R <= 0).any()):  # to ask a GPU would be to wait for it
        token_R1 = torch.where(temperature_R[:, None] > 0, token_R1, logits_RV.argmax(-1, keepdim=True))
    # One NaN or +inf makes all log-probabilities of a row NaN, and so do -inf alone.
    token_R = token_R1[:, 0].masked_fill(full_RV[:, 0].isnan() | (temperature_R < 0), 0)
    logprob_R = full_RV.gather(1, token_R[:, None])[:, 0].masked_fill(temperature_R < 0, 0.0)
    sampling_R = drawn_RV.gather(1, token_R[:, None])[:, 0]
    sampling_R = sampling_R.masked_fill((temperature_R <= 0) & ~full_RV[:, 0].isnan(), 0.0)
    return token_R, logprob_R, sampling_R.masked_fill(temperature_R < 0, 0.0)


def uniforms(seed_R: Tensor, index_R: Tensor, position_R: Tensor) -> Tensor:
    """Return the float64 in [0, 1) that each row is drawn at: 53 bits of Philox4x32-10. The arguments are int64."""
    low = 0xFFFFFFFF
    c0, c1 = position_R & low, (position_R >> 32) & low
    c2, c3 = index_R & low, torch.zeros_like(index_R)
    k0, k1 = seed_R & low, (seed_R >> 32) & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2**64, as bits
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return ((c0 << 21) ^ (c1 >> 11)).double() * 2.0**-53


def _check_rows(logits_RV: Tensor, rows: tuple[Tensor, ...], cuts: tuple[Tensor | None, ...]) -> None:
    shape = tuple(logits_RV.shape)
    check(len(shape) == 2 and shape[1] > 0, f"draw_tokens: logits {shape} are not [R, V] with at least one token.")
    check(logits_RV.is_floating_point(), f"draw_tokens: logits are {logits_RV.dtype}, expected floating point.")
    names = ("temperature", "seed", "index", "position", "top_k", "top_p", "min_p")
    for name, tensor in zip(names, (*rows, *cuts), strict=True):
        if tensor is not None:
            found = tuple(tensor.shape)
            check(found == shape[:1], f"draw_tokens: {name} is {found}, expected one entry a row, [{shape[0]}].")
            check(tensor.is_contiguous(), f"draw_tokens: {name} is not contiguous.")
            real = name in ("temperature", "top_p", "min_p")
            expected = (torch.float32,) if real else (torch.int64,)
            check(tensor.dtype in expected, f"draw_tokens: {name} is {tensor.dtype}, expected {expected[0]}.")
