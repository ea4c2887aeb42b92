"""The ops that models call. `Ops` is plain PyTorch: the reference that every faster or stricter kind is held to.

Shapes: T tokens of this step, R decode rows, H query heads, K kv heads, G = H / K, D head dim
(of values, W), E hidden size, N blocks, B block size, L attended length. The references take any head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from rolloutd.kernels.adapters import TailAdapters, adapted_reference
from rolloutd.weights.packing import Linear

from .inputs import ForwardInputs, PrefillRows
from .kv_cache import KVLayer


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How a layer attends."""

    scale: float
    """Factor of the scores."""
    window: int | None = None
    """Tokens that a query reaches back, itself included; None reaches all."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap) before the mask (Gemma 2)."""


@dataclass(frozen=True)
class Rotation:
    """Rotary positions of a step: fp32 tables [positions, 1, R] and the positions that the step's tokens have."""

    cos: Tensor
    sin: Tensor
    positions_T: Tensor
    dtype: torch.dtype
    """What cos and sin are rounded to."""

    @cached_property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Cos and sin of the tokens, [T, 1, R]; gathered once for all layers."""
        return self.cos[self.positions_T].to(self.dtype), self.sin[self.positions_T].to(self.dtype)


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What happens to queries and keys between their projection and attention."""

    head_dim: int
    eps: float
    """Of the norms of single heads, where there are any."""
    norm_offset: float
    norm_rounds_last: bool
    rotation: Rotation | None
    rope_rounds_last: bool
    """Rotated heads are rounded back to the dtype that they had before."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A projection [T, N] of whose adapters only A x is computed; the op that reads it adds the rest."""

    y_TN: Tensor
    adapters: TailAdapters


Projection = Tensor | Pending


def completed(projection: Projection, *sizes: int) -> Tensor:
    """Return a projection whose parts have these sizes, its adapters added."""
    if isinstance(projection, Tensor):
        return projection
    return adapted_reference(projection.y_TN, projection.adapters, sizes)


class Ops:
    """A model holds the kind that it was built with."""

    appends_adapters = False
    """Whether `project` leaves adapters to the op that follows it."""
    rows_of_mlp: int | None = None
    """Rows that go through an MLP at once; None: all of them."""

    def prepare(self, linears: Iterable[Linear], kv_layers: Iterable[KVLayer], num_threads: int | None = None) -> None:
        """Get ready for these linear maps and attention layers, before the first step; None: on all threads."""

    def embed(self, token_ids_T: Tensor, embedding_VE: Tensor, scale: float) -> Tensor:
        """Return scale * embeddings of tokens, [T, E]."""
        x_TE = F.embedding(token_ids_T, embedding_VE)
        return x_TE if scale == 1.0 else x_TE * scale

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds_last: bool = False
    ) -> Tensor:
        """Return weight * (x / rms(x)), normalised in fp32 and cast back before the weight, as transformers' Llama.

        With `rounds_last` the cast comes after the weight, to which `offset` is added in fp32 (Gemma, OLMo).
        """
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        if rounds_last:
            return (x32 * (offset + weight.float())).to(x.dtype)
        return weight * x32.to(x.dtype)

    def add_rms_norm(
        self, x: Projection, residual: Tensor, weight: Tensor, eps: float, *, offset: float, rounds_last: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of residual + x, and that sum."""
        total = residual + completed(x, residual.shape[1])
        return self.rms_norm(total, weight, eps, offset=offset, rounds_last=rounds_last), total

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """Return x W^T + b in the matrix dtype, plus each adapter's scaling * B (A x) on its columns."""
        return self._add_adapters(F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias), x, layer)

    def _add_adapters(self, y: Tensor, x: Tensor, layer: Linear) -> Tensor:
        for cut in layer.lora:
            delta = F.linear(F.linear(x.to(cut.a.dtype), cut.a), cut.b) * cut.scaling
            columns = y[..., cut.start : cut.stop]
            columns.copy_(columns + delta)
        return y

    def project(self, x: Tensor, layer: Linear) -> Projection:
        """Return `linear`, perhaps with the adapters left to the op that reads it next."""
        return self.linear(x, layer)

    def rotate(self, x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
        """Return `x` with rotary positions applied to halves of its first R dimensions; the others pass by.

        Su et al. 2021, in transformers' layout.
        """
        rotary_dim = cos_T1R.shape[-1]
        x_THR = x_THD[..., :rotary_dim]
        first, second = x_THR.chunk(2, dim=-1)
        turned_THR = x_THR * cos_T1R + torch.cat((-second, first), dim=-1) * sin_T1R
        if rotary_dim == x_THD.shape[-1]:
            return turned_THR
        return torch.cat((turned_THR, x_THD[..., rotary_dim:]), dim=-1)

    def rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        k_cache_NBKD: Tensor,
        v_cache_NBKD: Tensor,
        inputs: ForwardInputs,
        heads: HeadSpec,
        adapters: TailAdapters | None = None,
    ) -> Tensor:
        """Norm and rotate the heads of projections [T, heads * D], store keys and values; return queries [T, H, D].

        `adapters` are those of q, k and v that are still to be added.
        """
        sizes = [q.shape[1], k.shape[1], v.shape[1]]
        if adapters is not None:
            q, k, v = torch.split(adapted_reference(torch.cat((q, k, v), dim=1), adapters, sizes), sizes, dim=1)
        q_THD, k_TKD, v_TKD = (part.view(part.shape[0], -1, heads.head_dim) for part in (q, k, v))
        q_THD = self._normed_and_rotated(q_THD, q_norm, heads)
        self.store_kv(self._normed_and_rotated(k_TKD, k_norm, heads), v_TKD, k_cache_NBKD, v_cache_NBKD, inputs)
        return q_THD

    def _normed_and_rotated(self, x_THD: Tensor, norm: Tensor | None, heads: HeadSpec) -> Tensor:
        if norm is not None:
            x_THD = self.rms_norm(x_THD, norm, heads.eps, offset=heads.norm_offset, rounds_last=heads.norm_rounds_last)
        if heads.rotation is None:
            return x_THD
        turned_THD = self.rotate(x_THD, *heads.rotation.angles)
        return turned_THD.to(x_THD.dtype) if heads.rope_rounds_last else turned_THD

    def silu_and_mul(self, gate_up: Projection) -> Tensor:
        """Return silu(first half) * second half of [T, F]."""
        gate, up = halves(gate_up)
        return F.silu(gate) * up

    def gelu_tanh_and_mul(self, gate_up: Projection) -> Tensor:
        """Return gelu(first half) * second half of [T, F], gelu by its tanh approximation."""
        gate, up = halves(gate_up)
        return F.gelu(gate, approximate="tanh") * up

    def sigmoid(self, x: Tensor) -> Tensor:
        """Return 1 / (1 + exp(-x))."""
        return torch.sigmoid(x)

    def store_kv(
        self, k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, inputs: ForwardInputs
    ) -> None:
        """Write keys and values of the real rows to their slots, cast to the cache's dtype."""
        places = _places(inputs.slot_mapping_T, k_cache_NBKD)
        n = inputs.slot_mapping_T.shape[0]
        k_cache_NBKD.index_put_(places, k_TKD[:n].to(k_cache_NBKD.dtype))
        v_cache_NBKD.index_put_(places, v_TKD[:n].to(v_cache_NBKD.dtype))

    def paged_attention(
        self, q_THD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKW: Tensor, inputs: ForwardInputs, spec: AttentionSpec
    ) -> Tensor:
        """Causal attention of each query token over its own sequence's cached blocks; returns [T, H, W].

        Rows of padding, and decode rows of length 0, come back as zeros.
        """
        q_THD = q_THD.to(k_cache_NBKD.dtype)
        n = inputs.num_decode
        out = q_THD.new_zeros((*q_THD.shape[:2], v_cache_NBKW.shape[-1]))
        if n:
            out[:n] = _decode(q_THD[:n], k_cache_NBKD, v_cache_NBKW, inputs, spec)
        for rows in inputs.prefills:
            span = slice(rows.row, rows.row + rows.length)
            out[span] = _prefill(q_THD[span], k_cache_NBKD, v_cache_NBKW, rows, spec)
        return out


def halves(gate_up: Projection) -> tuple[Tensor, Tensor]:
    """Return gate and up, their adapters added."""
    width = (gate_up if isinstance(gate_up, Tensor) else gate_up.y_TN).shape[-1]
    gate, up = completed(gate_up, width // 2, width // 2).chunk(2, dim=-1)
    return gate, up


def _decode(q_RHD: Tensor, k_NBKD: Tensor, v_NBKW: Tensor, inputs: ForwardInputs, spec: AttentionSpec) -> Tensor:
    """One query per sequence: the G query heads of a kv head are the rows of one small attention."""
    num_rows, num_heads, head_dim = q_RHD.shape
    num_kv_heads, block_size = k_NBKD.shape[2], k_NBKD.shape[1]
    lens_R1 = inputs.decode_lens_R[:, None]
    tables_RM = inputs.decode_block_tables_RM.long()
    at_L = torch.arange(tables_RM.shape[1] * block_size, device=q_RHD.device)
    mask_RL = at_L < lens_R1
    # A masked place reads its row's first token: what lies there itself may be NaN, which a weight of 0 does not hide.
    slots_RL = (tables_RM[:, :, None] * block_size + at_L[:block_size]).flatten(1)
    slots = torch.where(mask_RL, slots_RL, slots_RL[:, :1]).flatten()
    k_RKLD = _gather(k_NBKD, slots, num_rows).transpose(1, 2)
    v_RKLW = _gather(v_NBKW, slots, num_rows).transpose(1, 2)
    q_RKGD = q_RHD.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if spec.window is not None:
        mask_RL &= at_L >= lens_R1 - spec.window
    out = _attend(q_RKGD, k_RKLD, v_RKLW, mask_RL[:, None, None, :], spec)
    return out.reshape(num_rows, num_heads, -1).masked_fill_((lens_R1 == 0)[:, :, None], 0.0)


def _gather(cache_NBKD: Tensor, slots: Tensor, num_rows: int) -> Tensor:
    """Return the tokens at `slots` by row, [R, L, K, D]."""
    return cache_NBKD[_places(slots, cache_NBKD)].view(num_rows, -1, *cache_NBKD.shape[2:])


def _places(slots: Tensor, cache_NBKD: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks and places in them."""
    block_size = cache_NBKD.shape[1]
    return slots // block_size, slots % block_size


def _prefill(q_THD: Tensor, k_NBKD: Tensor, v_NBKW: Tensor, rows: PrefillRows, spec: AttentionSpec) -> Tensor:
    """A chunk of one sequence over all tokens up to its end."""
    end = rows.start + rows.length
    k_1KLD = k_NBKD[rows.block_table_M].flatten(0, 1)[:end].transpose(0, 1)[None]
    v_1KLW = v_NBKW[rows.block_table_M].flatten(0, 1)[:end].transpose(0, 1)[None]
    q_1HTD = q_THD.transpose(0, 1)[None]
    mask_TL = None
    if rows.start > 0 or (spec.window is not None and end > spec.window) or spec.softcap is not None:
        query_T1 = torch.arange(rows.start, end, device=q_THD.device)[:, None]
        key_L = torch.arange(end, device=q_THD.device)
        mask_TL = key_L <= query_T1
        if spec.window is not None:
            mask_TL &= key_L > query_T1 - spec.window
    out = _attend(q_1HTD, k_1KLD, v_1KLW, mask_TL, spec)
    return out[0].transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec) -> Tensor:
    """Attention of [..., heads, rows, D] over [..., kv heads, L, D]; no mask means causal from position 0."""
    if spec.softcap is None:
        grouped = q.shape[-3] != k.shape[-3]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=spec.scale, enable_gqa=grouped
        )
    assert mask is not None, "soft-capped scores are masked explicitly"
    repeats = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
    scores = torch.tanh(q @ k.transpose(-1, -2) * spec.scale / spec.softcap) * spec.softcap
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")).float(), dim=-1)
    return weights.to(q.dtype) @ v
