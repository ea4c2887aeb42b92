"""Ops whose result for a row does not depend, to the last bit, on which other rows are computed with it.

What changes bits, measured with torch 2.13 on an AVX2 CPU: products of fewer than 4 rows, or of 5 to 7 on two threads,
against those of other counts; the number of keys that an attention kernel is given; `silu`, `gelu` and `sigmoid`, whose
last elements before a thread's or a vector's end take another code path. `exp`, `tanh`, softmax and norms do not.

So products run in row counts that are proven equal when the engine starts, attention goes over pieces of fixed length
that are merged in order, and activations are written in terms of `exp` and `tanh`. On a GPU the same holds by the same
proof, but has not been measured. Shapes as in ops.py; S = pieces, P = PIECE, Q = query rows of one kv head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rolloutd.errors import ConfigError
from rolloutd.weights.packing import Linear

from .inputs import ForwardInputs, PrefillRows
from .ops import AttentionSpec, Ops

ROW_COUNTS = (4, 8, 16, 32, 64, 128, 256)
"""Tried by the probe; larger batches are computed in several products."""
PROBE_FLOPS = 2e10
"""Spent at most on proving one shape: a second or less."""
PIECE = 128
"""Keys of one piece. A constant: another value gives other last bits."""
QUERY_TILE = 256
"""Queries of a chunk that are attended at once, which bounds the memory of their scores."""

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


class RowInvariantOps(Ops):
    """The ops of `deterministic=True`."""

    def __init__(self, product: Product = F.linear) -> None:
        self._product = product
        self._row_counts: dict[tuple[int, int, torch.dtype], tuple[int, ...]] = {}

    def prepare(self, matrices: Iterable[Tensor]) -> None:
        """Find the row counts in which products with these matrices agree; `ConfigError` where there are none."""
        for weight in matrices:
            self._counts_for(weight)

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """Return x W^T + b and the adapters' parts, in proven row counts."""
        y = self._map(x.to(layer.weight.dtype), layer.weight, layer.bias)
        for cut in layer.lora:
            delta = self._map(self._map(x.to(cut.a.dtype), cut.a, None), cut.b, None) * cut.scaling
            columns = y[..., cut.start : cut.stop]
            columns.copy_(columns + delta)
        return y

    def silu_and_mul(self, gate_up_TF: Tensor) -> Tensor:
        """Return silu(first half) * second half."""
        gate, up = gate_up_TF.chunk(2, dim=-1)
        gate32 = gate.float()
        return (gate32 / (1.0 + torch.exp(-gate32))).to(gate.dtype) * up

    def gelu_tanh_and_mul(self, gate_up_TF: Tensor) -> Tensor:
        """Return gelu(first half) * second half, gelu by its tanh approximation (Hendrycks and Gimpel 2016)."""
        gate, up = gate_up_TF.chunk(2, dim=-1)
        x = gate.float()
        inner = (2.0 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)
        return (0.5 * x * (1.0 + torch.tanh(inner))).to(gate.dtype) * up

    def sigmoid(self, x: Tensor) -> Tensor:
        """Return 1 / (1 + exp(-x))."""
        return (1.0 / (1.0 + torch.exp(-x.float()))).to(x.dtype)

    def paged_attention(
        self, q_THD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKW: Tensor, inputs: ForwardInputs, spec: AttentionSpec
    ) -> Tensor:
        """Causal attention over each row's own blocks, the same for a row of a chunk and for one that decodes."""
        num_heads, num_kv_heads = q_THD.shape[1], k_cache_NBKD.shape[2]
        q_THD = q_THD.to(k_cache_NBKD.dtype)
        out = q_THD.new_zeros((q_THD.shape[0], num_heads, v_cache_NBKW.shape[-1]))
        caches = k_cache_NBKD, v_cache_NBKW
        n = inputs.num_decode
        if n:
            q_RKGD = q_THD[:n].reshape(n, num_kv_heads, num_heads // num_kv_heads, -1)
            tables, lens_R1 = inputs.decode_block_tables_RM, inputs.decode_lens_R[:, None]
            num_tokens = int(inputs.decode_lens_R.max())
            attended = _attend(q_RKGD, *_pieces(caches, tables, num_tokens), lens_R1.expand(-1, num_heads), spec)
            out[:n] = attended.flatten(1, 2)
        for rows in inputs.prefills:
            for start in range(0, rows.length, QUERY_TILE):
                tile = slice(rows.row + start, rows.row + min(start + QUERY_TILE, rows.length))
                out[tile] = _attend_chunk(q_THD[tile], caches, rows, rows.start + start, spec)
        return out

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.flatten(0, -2)
        counts = self._counts_for(weight)
        parts = []
        at = 0
        for count in _split(rows.shape[0], counts):
            part = rows[at : at + count]
            missing = count - part.shape[0]
            y = self._product(F.pad(part, (0, 0, 0, missing)) if missing else part, weight, bias)
            parts.append(y[: part.shape[0]])
            at += count
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.view(*x.shape[:-1], -1)

    def _counts_for(self, weight: Tensor) -> tuple[int, ...]:
        shape = (*weight.shape, weight.dtype)
        counts = self._row_counts.get(shape)
        if counts is None:
            counts = self._row_counts[shape] = self._probe(weight)
        return counts

    def _probe(self, weight: Tensor) -> tuple[int, ...]:
        """Return the row counts, largest first, in which every row has the same bits wherever it stands."""
        num_out, num_in = weight.shape
        affordable = [m for m in ROW_COUNTS if 8.0 * num_out * num_in * m <= PROBE_FLOPS] or [ROW_COUNTS[0]]
        for smallest in affordable:
            equal = [m for m in affordable if m >= smallest and self._agree(weight, smallest, m)]
            if smallest in equal:
                return tuple(reversed(equal))
        raise ConfigError(
            f"deterministic=True: products with a {num_out} x {num_in} matrix in {weight.dtype} on {weight.device} "
            f"depend on the place of a row, in all of the row counts {affordable}. Leave deterministic out, or use "
            "another device or numerics."
        )

    def _agree(self, weight: Tensor, few: int, many: int) -> bool:
        """Return whether `many` rows in one product have the bits that they have `few` at a time, and out of order."""
        generator = torch.Generator().manual_seed(few * 1009 + many)
        x = torch.randn((many, weight.shape[1]), generator=generator).to(weight.device, weight.dtype)
        if many % few:
            return False
        apart = torch.cat([self._product(part, weight, None) for part in torch.split(x, few)])
        together = self._product(x, weight, None)
        turned = self._product(x.roll(1 + many // 2, 0), weight, None).roll(-1 - many // 2, 0)
        return torch.equal(apart, together) and torch.equal(apart, turned)


def _split(num_rows: int, counts: Sequence[int]) -> list[int]:
    """Return row counts, of those in `counts` (largest first), that hold `num_rows`; the last may hold a few more."""
    parts: list[int] = []
    while num_rows > 0:
        count = next((m for m in counts if m <= num_rows), counts[-1])
        parts.append(count)
        num_rows -= count
    return parts


def _pieces(caches: tuple[Tensor, Tensor], tables_RM: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return keys [R, K, S, P, D] and values [R, K, S, P, W] of the first `num_tokens`; what follows is masked."""
    block_size = caches[0].shape[1]
    length = -(-num_tokens // PIECE) * PIECE
    num_blocks = -(-length // block_size)
    tables = F.pad(tables_RM[:, :num_blocks], (0, max(0, num_blocks - tables_RM.shape[1])))

    def gather(cache_NBKD: Tensor) -> Tensor:
        tokens = cache_NBKD[tables].flatten(1, 2)[:, :length]
        pieces = tokens.reshape(tokens.shape[0], -1, PIECE, *tokens.shape[2:])
        return pieces.permute(0, 3, 1, 2, 4)

    return gather(caches[0]), gather(caches[1])


def _attend_chunk(
    q_THD: Tensor, caches: tuple[Tensor, Tensor], rows: PrefillRows, start: int, spec: AttentionSpec
) -> Tensor:
    """Attend queries at positions `start` and on of one sequence; returns [T, H, W]."""
    num_rows, num_heads, _ = q_THD.shape
    num_kv_heads = caches[0].shape[2]
    group = num_heads // num_kv_heads
    k, v = _pieces(caches, rows.block_table_M[None], start + num_rows)
    q_1KQD = q_THD.reshape(num_rows, num_kv_heads, group, -1).transpose(0, 1).flatten(1, 2)[None]
    lens_T = torch.arange(start + 1, start + num_rows + 1, device=q_THD.device)
    lens_1H = lens_T.repeat_interleave(group).repeat(num_kv_heads)[None]
    out_1KQW = _attend(q_1KQD, k, v, lens_1H, spec)
    return out_1KQW.reshape(num_kv_heads, num_rows, group, -1).transpose(0, 1).flatten(1, 2)


def _attend(q_RKQD: Tensor, k_RKSPD: Tensor, v_RKSPW: Tensor, lens_RH: Tensor, spec: AttentionSpec) -> Tensor:
    """Return [R, K, Q, W]: each query attends to its first `lens` keys, piece by piece, the pieces merged in order."""
    num_rows, num_kv_heads, num_queries, _ = q_RKQD.shape
    num_pieces = k_RKSPD.shape[2]
    q_RKQD = F.pad(q_RKQD.float(), (0, 0, 0, -num_queries % ROW_COUNTS[0]))
    padded = q_RKQD.shape[2]
    lens_RKQ = F.pad(lens_RH.reshape(num_rows, num_kv_heads, num_queries), (0, padded - num_queries), value=1)

    q = q_RKQD[:, :, None].expand(-1, -1, num_pieces, -1, -1).flatten(0, 2)
    k, v = k_RKSPD.float().flatten(0, 2), v_RKSPW.float().flatten(0, 2)
    scores = torch.bmm(q, k.transpose(1, 2)) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores.view(num_rows, num_kv_heads, num_pieces, padded, PIECE)
    at_SP = torch.arange(num_pieces * PIECE, device=q.device).view(num_pieces, 1, PIECE)
    lens = lens_RKQ[:, :, None, :, None]
    hidden = at_SP >= lens
    if spec.window is not None:
        hidden |= at_SP < lens - spec.window
    scores = scores.masked_fill_(hidden, float("-inf"))

    top_RKSQ1 = scores.amax(-1, keepdim=True)
    p = torch.exp(scores - top_RKSQ1.masked_fill(top_RKSQ1 == float("-inf"), 0.0))
    sums = p.sum(-1, keepdim=True)
    parts = torch.bmm(p.flatten(0, 2), v).view(num_rows, num_kv_heads, num_pieces, padded, -1)
    factors = torch.exp(top_RKSQ1 - top_RKSQ1.amax(2, keepdim=True))
    # In order, one by one: a piece that is masked throughout adds zero and leaves the bits as they are.
    total, norm = parts[:, :, 0] * factors[:, :, 0], sums[:, :, 0] * factors[:, :, 0]
    for s in range(1, num_pieces):
        total = total + parts[:, :, s] * factors[:, :, s]
        norm = norm + sums[:, :, s] * factors[:, :, s]
    return (total / norm)[:, :, :num_queries].to(v_RKSPW.dtype)
