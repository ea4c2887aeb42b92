"""Ops whose result for a row does not depend, to the last bit, on which other rows are computed with it.

What changes bits, measured with torch 2.13 on AVX2 and AVX-512 CPUs in fp32: products of fewer than 4 rows, or of odd
counts below 12 on two threads, against those of other counts; products of fewer than 12 columns, by where rows lie in
memory; the number of keys that an attention kernel is given; `silu`, `gelu` and `sigmoid`, whose last elements before a
thread's or a vector's end take another code path. `exp`, `tanh`, softmax and norms do not; bf16 products did not.

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
from .kv_cache import KVLayer
from .ops import AttentionSpec, Ops, Projection, halves
from .row_proof import proven_counts, rows_for_proof

ROW_COUNTS = (4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 224, 256)
"""Of products; larger batches are computed in several. Close enough that little is computed for padding."""
QUERY_COUNTS = (4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Of query rows of one kv head."""
MIN_COLUMNS = 16
"""Narrower matrices (adapters, routers) are widened by zeros: below 12 columns MKL's kernels go by alignment."""
ALIGNMENT = 64
"""Bytes; rows that start elsewhere are copied."""
LARGE = 1 << 24
"""Numbers of a matrix that is not worth a random copy."""
QUERY_TILE = 256
"""Queries of a chunk that are attended at once, which bounds the memory of their scores."""
BATCHES = (1, 2, 3, 5, 16, 37)
"""Numbers of products in one call that are compared with single ones."""
PROOF_ROWS = 256
"""Rows of such a call, at most, unless two products have more."""
PIECE = 128
"""Keys of one piece. A constant: another value gives other last bits."""

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
BatchedProduct = Callable[..., Tensor]
"""As `torch.bmm`."""


class RowInvariantOps(Ops):
    """The ops of `deterministic=True`."""

    def __init__(self, product: Product = F.linear, batched_product: BatchedProduct = torch.bmm) -> None:
        self._product = product
        self._bmm = batched_product
        self._proven: dict[tuple[object, ...], tuple[int, ...]] = {}

    def prepare(self, linears: Iterable[Linear], kv_layers: Iterable[KVLayer], num_threads: int | None = None) -> None:
        """Find the row counts in which these products agree; `ConfigError` where there are none."""
        device = torch.device("cpu")
        for layer in linears:
            device = layer.weight.device
            self._row_counts(*_widened(layer.weight, layer.bias))
            for cut in layer.lora:
                self._row_counts(*_widened(cut.a, None))
                self._row_counts(*_widened(cut.b, None))
        for kv_layer in kv_layers:
            self._query_counts(kv_layer.num_heads, kv_layer.key_dim, max(kv_layer.value_dim, MIN_COLUMNS), device)

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """Return x W^T + b and the adapters' parts, in proven row counts."""
        y = self._map(x.to(layer.weight.dtype), layer.weight, layer.bias)
        for cut in layer.lora:
            delta = self._map(self._map(x.to(cut.a.dtype), cut.a, None), cut.b, None) * cut.scaling
            columns = y[..., cut.start : cut.stop]
            columns.copy_(columns + delta)
        return y

    def silu_and_mul(self, gate_up: Projection) -> Tensor:
        """Return silu(first half) * second half."""
        gate, up = halves(gate_up)
        gate32 = gate.float()
        return (gate32 / (1.0 + torch.exp(-gate32))).to(gate.dtype) * up

    def gelu_tanh_and_mul(self, gate_up: Projection) -> Tensor:
        """Return gelu(first half) * second half, gelu by its tanh approximation (Hendrycks and Gimpel 2016)."""
        gate, up = halves(gate_up)
        x = gate.float()
        inner = (2.0 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)
        return (0.5 * x * (1.0 + torch.tanh(inner))).to(gate.dtype) * up

    def sigmoid(self, x: Tensor) -> Tensor:
        """Return 1 / (1 + exp(-x))."""
        return (1.0 / (1.0 + torch.exp(-x.float()))).to(x.dtype)

    def paged_attention(
        self, q_THD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKW: Tensor, inputs: ForwardInputs, spec: AttentionSpec
    ) -> Tensor:
        """Causal attention over each row's own blocks, the same for a row of a chunk and for one that decodes.

        Rows of padding, and decode rows of length 0, come back as zeros.
        """
        num_heads, num_kv_heads = q_THD.shape[1], k_cache_NBKD.shape[2]
        q_THD = q_THD.to(k_cache_NBKD.dtype)
        out = q_THD.new_zeros((q_THD.shape[0], num_heads, v_cache_NBKW.shape[-1]))
        caches = k_cache_NBKD, v_cache_NBKW
        n = inputs.num_decode
        if n:
            q_RKGD = q_THD[:n].reshape(n, num_kv_heads, num_heads // num_kv_heads, -1)
            tables, lens_R = inputs.decode_block_tables_RM, inputs.decode_lens_R
            num_tokens = max(1, int(lens_R.max()))
            lens_RQ = lens_R[:, None].expand(-1, q_RKGD.shape[2])
            out[:n] = self._attend(q_RKGD, *_pieces(caches, tables, num_tokens), lens_RQ, spec).flatten(1, 2)
            out[:n].masked_fill_((lens_R == 0)[:, None, None], 0.0)
        for rows in inputs.prefills:
            for start in range(0, rows.length, QUERY_TILE):
                tile = slice(rows.row + start, rows.row + min(start + QUERY_TILE, rows.length))
                out[tile] = self._attend_chunk(q_THD[tile], caches, rows, rows.start + start, spec)
        return out

    def _attend_chunk(
        self, q_THD: Tensor, caches: tuple[Tensor, Tensor], rows: PrefillRows, start: int, spec: AttentionSpec
    ) -> Tensor:
        """Attend queries at positions `start` and on of one sequence; returns [T, H, W]."""
        num_rows, num_heads, _ = q_THD.shape
        num_kv_heads = caches[0].shape[2]
        group = num_heads // num_kv_heads
        k, v = _pieces(caches, rows.block_table_M[None], start + num_rows)
        q_1KQD = q_THD.reshape(num_rows, num_kv_heads, group, -1).transpose(0, 1).flatten(1, 2)[None]
        lens_T = torch.arange(start + 1, start + num_rows + 1, device=q_THD.device)
        out_1KQW = self._attend(q_1KQD, k, v, lens_T.repeat_interleave(group)[None], spec)
        return out_1KQW[0].reshape(num_kv_heads, num_rows, group, -1).transpose(0, 1).flatten(1, 2)

    def _attend(self, q_RKQD: Tensor, k_NPKD: Tensor, v_NPKW: Tensor, lens_RQ: Tensor, spec: AttentionSpec) -> Tensor:
        """Return [R, K, Q, W]: each query attends to its first `lens` keys; queries go in proven numbers."""
        width, dtype = v_NPKW.shape[-1], v_NPKW.dtype
        k, v = k_NPKD.float(), v_NPKW.float()
        if width < MIN_COLUMNS:
            v = F.pad(v, (0, MIN_COLUMNS - width))
        counts = self._query_counts(k.shape[2], k.shape[-1], v.shape[-1], k.device)
        parts, at, num_queries = [], 0, q_RKQD.shape[2]
        for count in _cover(num_queries, counts):
            q, lens = q_RKQD[:, :, at : at + count].float(), lens_RQ[:, at : at + count]
            missing = count - q.shape[2]
            if missing:
                q, lens = F.pad(q, (0, 0, 0, missing)), F.pad(lens, (0, missing), value=1)
            parts.append(self._attend_rows(q, k, v, lens, spec)[:, :, : count - missing, :width])
            at += count
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).to(dtype)

    def _attend_rows(
        self, q_RKQD: Tensor, k_NPKD: Tensor, v_NPKW: Tensor, lens_RQ: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Attend a proven number of queries, in fp32: piece by piece, the pieces merged in order."""
        num_rows, num_kv_heads, count, _ = q_RKQD.shape
        num_pieces = k_NPKD.shape[0] // num_rows
        q_KNQD = q_RKQD.transpose(0, 1)[:, :, None].expand(-1, -1, num_pieces, -1, -1).flatten(1, 2)
        scores_KNQP = q_KNQD.new_empty((*q_KNQD.shape[:3], PIECE))
        for head in range(num_kv_heads):  # in place: copying keys into head order costs more than the products
            self._bmm(q_KNQD[head], k_NPKD[:, :, head].transpose(1, 2), out=scores_KNQP[head])
        scores_KNQP *= spec.scale
        if spec.softcap is not None:
            scores_KNQP = torch.tanh(scores_KNQP / spec.softcap) * spec.softcap
        scores_KRSQP = scores_KNQP.view(num_kv_heads, num_rows, num_pieces, count, PIECE)
        at_SP = torch.arange(num_pieces * PIECE, device=lens_RQ.device).view(num_pieces, 1, PIECE)
        lens = lens_RQ[:, None, :, None]
        hidden_RSQP = at_SP >= lens
        if spec.window is not None:
            hidden_RSQP |= at_SP < lens - spec.window
        scores_KRSQP.masked_fill_(hidden_RSQP, float("-inf"))

        # The maximum over all pieces is exact in any order, so that every piece has one and the same scale.
        top_KR1Q1 = scores_KRSQP.amax(-1, keepdim=True).amax(2, keepdim=True)
        p_KRSQP = scores_KRSQP.sub_(top_KR1Q1).exp_()
        sums = p_KRSQP.sum(-1, keepdim=True)
        p_KNQP = p_KRSQP.flatten(1, 2)
        values_KNQW = q_KNQD.new_empty((*q_KNQD.shape[:3], v_NPKW.shape[-1]))
        for head in range(num_kv_heads):
            self._bmm(p_KNQP[head], v_NPKW[:, :, head], out=values_KNQW[head])
        values = values_KNQW.view(num_kv_heads, num_rows, num_pieces, count, -1)
        # One by one: a piece that is masked throughout adds zero and leaves the bits as they are.
        total, norm = values[:, :, 0], sums[:, :, 0]
        for s in range(1, num_pieces):
            total, norm = total + values[:, :, s], norm + sums[:, :, s]
        return (total / norm).transpose(0, 1)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        num_out = weight.shape[0]
        weight, bias = _widened(weight, bias)
        rows = x.flatten(0, -2).contiguous()
        if rows.data_ptr() % ALIGNMENT:
            rows = rows.clone()
        parts = []
        at = 0
        for count in _cover(rows.shape[0], self._row_counts(weight, bias)):
            part = rows[at : at + count]
            missing = count - part.shape[0]
            y = self._product(F.pad(part, (0, 0, 0, missing)) if missing else part, weight, bias)
            parts.append(y[: part.shape[0], :num_out])
            at += count
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.reshape(*x.shape[:-1], num_out)

    def _row_counts(self, weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
        key = weight.shape, weight.dtype, weight.device, bias is None, torch.get_num_threads()
        counts = self._proven.get(key)
        if counts is None:
            num_out, num_in = weight.shape
            # A new adapter's B is all zeros, with which every product agrees: only large matrices prove themselves.
            tried = weight if weight.numel() > LARGE else rows_for_proof(num_out, num_in, weight)
            shift = None if bias is None else rows_for_proof(1, num_out, bias)[0]
            x = rows_for_proof(ROW_COUNTS[-1], num_in, weight)
            counts = proven_counts(lambda rows: self._product(rows, tried, shift), x, num_out, ROW_COUNTS)
            self._proven[key] = _or_refuse(counts, f"{num_out} x {num_in} matrix", weight.dtype, weight.device)
        return counts

    def _query_counts(self, num_kv_heads: int, key_dim: int, value_dim: int, device: torch.device) -> tuple[int, ...]:
        """Return the numbers of query rows in which both products of attention agree, in batches of several sizes."""
        key = num_kv_heads, key_dim, value_dim, device, torch.get_num_threads()
        counts = self._proven.get(key)
        if counts is None:
            like = torch.empty(0, device=device)

            def pieces_of_a_head(dim: int) -> Tensor:
                """As they lie in the cache, among those of other heads."""
                rows = rows_for_proof(BATCHES[-1] * PIECE, num_kv_heads * dim, like)
                return rows.view(BATCHES[-1], PIECE, num_kv_heads, dim)[:, :, -1]

            for_scores = self._batched_counts(pieces_of_a_head(key_dim).transpose(1, 2))
            for_values = self._batched_counts(pieces_of_a_head(value_dim))
            both = tuple(m for m in for_scores if m in for_values)
            counts = self._proven[key] = _or_refuse(both, f"{key_dim} x {PIECE} piece of keys", like.dtype, device)
        return counts

    def _batched_counts(self, matrices_BKN: Tensor) -> tuple[int, ...]:
        """Return row counts that agree with one matrix, and in which a batch of products agrees with single ones."""
        _, num_in, num_out = matrices_BKN.shape
        x = rows_for_proof(QUERY_COUNTS[-1], num_in, matrices_BKN)
        counts = proven_counts(lambda rows: self._bmm(rows[None], matrices_BKN[:1])[0], x, num_out, QUERY_COUNTS)

        def keeps_bits(count: int) -> bool:
            many = matrices_BKN[: max(2, PROOF_ROWS // count)]
            alone = torch.cat([self._bmm(x[None, :count], matrix[None]) for matrix in many])
            sizes = {min(size, len(many)) for size in BATCHES}
            return all(
                torch.equal(self._bmm(x[:count].expand(size, -1, -1), many[at : at + size]), alone[at : at + size])
                for size in sizes
                for at in {0, len(many) - size}
            )

        return tuple(m for m in counts if keeps_bits(m))


def _or_refuse(counts: tuple[int, ...], what: str, dtype: torch.dtype, device: torch.device) -> tuple[int, ...]:
    if not counts:
        raise ConfigError(
            f"deterministic=True: products with a {what} in {dtype} on {device} depend on the place of a row, in every "
            "number of rows that was tried. Leave deterministic out, or use another device or numerics."
        )
    return counts


def _widened(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a map of at least `MIN_COLUMNS` outputs; those that are added are zero."""
    missing = max(0, MIN_COLUMNS - weight.shape[0])
    if not missing:
        return weight, bias
    return F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing))


def _cover(num_rows: int, counts: Sequence[int]) -> list[int]:
    """Return row counts, of those in `counts` (largest first), that hold `num_rows`; the last may hold a few more."""
    whole, rest = divmod(num_rows, counts[0])
    parts = [counts[0]] * whole
    if rest:
        parts.append(min(m for m in counts if m >= rest))
    return parts


def _pieces(caches: tuple[Tensor, Tensor], tables_RM: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return keys [R * S, P, K, D] and values [R * S, P, K, W] of the first `num_tokens`; what follows is masked."""
    block_size = caches[0].shape[1]
    length = -(-num_tokens // PIECE) * PIECE
    num_blocks = -(-length // block_size)
    tables = tables_RM[:, :num_blocks]
    if tables.shape[1] < num_blocks:
        tables = F.pad(tables, (0, num_blocks - tables.shape[1]))

    def gather(cache_NBKD: Tensor) -> Tensor:
        tokens = cache_NBKD.index_select(0, tables.flatten()).reshape(len(tables), -1, *cache_NBKD.shape[2:])
        return tokens[:, :length].reshape(-1, PIECE, *tokens.shape[2:])

    return gather(caches[0]), gather(caches[1])
