"""The head of a language model and the draw in two launches, for steps of few rows.

Each program of the first multiplies all rows with one tile of the vocabulary, rounds the logits where a product in the
head's dtype does, stores them, and leaves the tile's maximum and sum of exponentials while it has them; the second is
that of draw.py. The number of rows does not enter the shape of a product, so a row's bits do not depend on it.

Shapes: R rows, E hidden size, V vocabulary, N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .draw import DrawConfig, draw_from_tiles, draw_tokens_reference
from .launch import HAS_TRITON, check, check_launchable

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def tanh(x: tl.tensor) -> tl.tensor:
        """Return tanh(x), without overflow."""
        e = tl.exp(-2.0 * tl.abs(x))
        positive = (1.0 - e) / (1.0 + e)
        return tl.where(x < 0.0, -positive, positive)

    @triton.jit
    def head_tiles_kernel(
        hidden_ptr: tl.tensor,
        head_ptr: tl.tensor,
        temperature_ptr: tl.tensor,
        logits_ptr: tl.tensor,
        max_ptr: tl.tensor,
        sum_ptr: tl.tensor,
        R: tl.tensor,
        hidden_stride: tl.tensor,
        head_stride: tl.tensor,
        divisor: tl.tensor,
        softcap: tl.tensor,
        V: tl.constexpr,
        E: tl.constexpr,
        N: tl.constexpr,
        HAS_DIVISOR: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_V: tl.constexpr,
        BLOCK_E: tl.constexpr,
    ) -> None:
        """One program computes one tile of all rows; each `.to(dtype)` is a rounding point of the reference."""
        dtype = logits_ptr.dtype.element_ty
        tile = tl.program_id(0)
        rows, ids = tl.arange(0, BLOCK_R), tile * BLOCK_V + tl.arange(0, BLOCK_V)
        hidden_at = rows[:, None].to(tl.int64) * hidden_stride
        head_at = ids[:, None].to(tl.int64) * head_stride
        total = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
        for first in range(0, E, BLOCK_E):
            places = first + tl.arange(0, BLOCK_E)[None, :]
            hidden = tl.load(hidden_ptr + hidden_at + places, mask=(rows[:, None] < R) & (places < E), other=0.0)
            head = tl.load(head_ptr + head_at + places, mask=(ids[:, None] < V) & (places < E), other=0.0)
            total = tl.dot(hidden, tl.trans(head), total, input_precision="ieee")
        logits = total.to(dtype).to(tl.float32)
        if HAS_DIVISOR:
            logits = (logits / divisor).to(dtype).to(tl.float32)
        if HAS_SOFTCAP:
            capped = tanh((logits / softcap).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
            logits = (capped * softcap).to(dtype).to(tl.float32)
        mask = (rows[:, None] < R) & (ids[None, :] < V)
        tl.store(logits_ptr + rows[:, None].to(tl.int64) * V + ids[None, :], logits.to(dtype), mask=mask)

        logits = tl.where(ids[None, :] < V, logits, float("-inf"))
        temperature = tl.load(temperature_ptr + rows, mask=rows < R, other=1.0)
        temperature = tl.where(temperature > 0.0, temperature, 1.0)
        highest = tl.max(logits, axis=1)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp((logits - base[:, None]) / temperature[:, None])
        tl.store(max_ptr + rows * N + tile, highest, mask=rows < R)
        tl.store(sum_ptr + rows * N + tile, tl.sum(weights, axis=1), mask=rows < R)


MAX_ROWS = 64
"""One tile of rows. Beyond it a product reads the head twice, and a library's product is the better one."""


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of the first launch."""

    block_v: int
    block_e: int
    num_warps: int
    num_stages: int


def head_config(dtype: torch.dtype) -> HeadConfig:
    """Return the tiles for a head of this dtype: three stages, of which an MI300X's 64 KiB hold the 48."""
    return HeadConfig(128, 64, 4, 3) if dtype.itemsize == 2 else HeadConfig(64, 32, 8, 2)


def head_and_draw(
    hidden_RE: Tensor,
    head_VE: Tensor,
    temperature_R: Tensor,
    seed_R: Tensor,
    index_R: Tensor,
    position_R: Tensor,
    *,
    logits_divisor: float = 1.0,
    logits_softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `draw_tokens` of the rows' logits: hidden head^T, over the divisor, then softcap * tanh(logits / softcap).

    `hidden` is cast to the head's dtype, and the logits are rounded to it after each of these steps. At most 64 rows.
    """
    rows = (temperature_R, seed_R, index_R, position_R)
    _check_shapes(hidden_RE, head_VE, rows)
    hidden_RE = hidden_RE.to(head_VE.dtype)
    for name, tensor in (("hidden", hidden_RE), ("head", head_VE)):
        check(tensor.stride(1) == 1 or tensor.shape[1] == 1, f"head_and_draw: {name} is not contiguous along E.")
    check_launchable("head_and_draw", hidden_RE, head_VE, *rows)
    (num_rows, hidden_size), vocab_size = hidden_RE.shape, head_VE.shape[0]
    config = head_config(head_VE.dtype)
    num_tiles = -(-vocab_size // config.block_v)
    logits_RV = torch.empty((num_rows, vocab_size), dtype=head_VE.dtype, device=head_VE.device)
    max_RN, sum_RN = torch.empty((2, num_rows, num_tiles), dtype=torch.float32, device=head_VE.device).unbind()
    if num_rows:
        head_tiles_kernel[(num_tiles,)](
            hidden_RE,
            head_VE,
            temperature_R,
            logits_RV,
            max_RN,
            sum_RN,
            num_rows,
            hidden_RE.stride(0),
            head_VE.stride(0),
            logits_divisor,
            1.0 if logits_softcap is None else logits_softcap,
            V=vocab_size,
            E=hidden_size,
            N=num_tiles,
            HAS_DIVISOR=logits_divisor != 1.0,
            HAS_SOFTCAP=logits_softcap is not None,
            BLOCK_R=MAX_ROWS,
            BLOCK_V=config.block_v,
            BLOCK_E=config.block_e,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
    tiles = DrawConfig(config.block_v, num_tiles, 4)
    return draw_from_tiles(logits_RV, rows, None, (max_RN, sum_RN, sum_RN), tiles)


def head_and_draw_reference(
    hidden_RE: Tensor,
    head_VE: Tensor,
    temperature_R: Tensor,
    seed_R: Tensor,
    index_R: Tensor,
    position_R: Tensor,
    *,
    logits_divisor: float = 1.0,
    logits_softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `head_and_draw` does, on any device."""
    _check_shapes(hidden_RE, head_VE, (temperature_R, seed_R, index_R, position_R))
    logits_RV = torch.nn.functional.linear(hidden_RE.to(head_VE.dtype), head_VE)
    if logits_divisor != 1.0:
        logits_RV = logits_RV / logits_divisor
    if logits_softcap is not None:
        logits_RV = torch.tanh(logits_RV / logits_softcap) * logits_softcap
    return draw_tokens_reference(logits_RV, temperature_R, seed_R, index_R, position_R)


def _check_shapes(hidden_RE: Tensor, head_VE: Tensor, rows: tuple[Tensor, ...]) -> None:
    hidden, head = tuple(hidden_RE.shape), tuple(head_VE.shape)
    fits = len(hidden) == len(head) == 2 and hidden[1] == head[1] > 0 and head[0] > 0
    check(fits, f"head_and_draw: hidden {hidden} and head {head} are not [R, E] and [V, E].")
    check(hidden[0] <= MAX_ROWS, f"head_and_draw: {hidden[0]} rows, at most {MAX_ROWS}. Use draw_tokens on the logits.")
    for name, tensor in (("hidden", hidden_RE), ("head", head_VE)):
        check(tensor.is_floating_point(), f"head_and_draw: {name} is {tensor.dtype}, expected floating point.")
    for name, tensor in zip(("temperature", "seed", "index", "position"), rows, strict=True):
        dtype = torch.float32 if name == "temperature" else torch.int64
        found = tuple(tensor.shape)
        fits = found == hidden[:1] and tensor.dtype == dtype and tensor.is_contiguous()
        check(fits, f"head_and_draw: {name} is {tensor.dtype} {found}, expected contiguous {dtype} [{hidden[0]}].")
