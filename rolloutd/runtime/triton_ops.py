"""Ops whose kernels are ours, for GPUs; products are cuBLAS's, and what has no kernel here is inherited."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rolloutd.kernels.adapters import TailAdapters
from rolloutd.kernels.add_rms_norm import add_rms_norm
from rolloutd.kernels.decode_attention import decode_attention
from rolloutd.kernels.gated_activation import gated_activation
from rolloutd.kernels.prefill_attention import prefill_attention
from rolloutd.kernels.prefix_attention import prefix_attention
from rolloutd.kernels.rms_norm import rms_norm
from rolloutd.kernels.rope_and_store import HeadNorms, Rope, rope_and_store
from rolloutd.weights.packing import Linear

from .inputs import ForwardInputs
from .ops import AttentionSpec, HeadSpec, Ops, Pending, Projection


class TritonOps(Ops):
    """What a decoding step of a Llama-like layer launches: 4 products, 2 norms, 1 activation, 1 rotation, attention.

    Adapters that are appended to the weights add no launch.
    """

    appends_adapters = True

    def project(self, x: Tensor, layer: Linear) -> Projection:
        """Return x W^T + b, and A x from the same product where A lies below W."""
        appended = layer.appended
        if appended is None:
            return self.linear(x, layer)
        out = F.linear(x.to(appended.weight.dtype), appended.weight, appended.bias)
        width = layer.weight.shape[0]
        tail = TailAdapters(out[:, width:], appended.b_rN, appended.columns, appended.scalings)
        return Pending(out[:, :width], tail)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds_last: bool = False
    ) -> Tensor:
        """Return the norm of the last dimension."""
        y = rms_norm(_rows(x), weight, eps, offset=offset, rounds_last=rounds_last)
        return y.view(x.shape)

    def add_rms_norm(
        self, x: Projection, residual: Tensor, weight: Tensor, eps: float, *, offset: float, rounds_last: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of residual + x, and that sum."""
        y_TE, adapters = _parts(x)
        return add_rms_norm(y_TE, residual, weight, eps, offset=offset, rounds_last=rounds_last, adapters=adapters)

    def silu_and_mul(self, gate_up: Projection) -> Tensor:
        """Return silu(first half) * second half."""
        gate_up_TF, adapters = _parts(gate_up)
        return gated_activation(gate_up_TF, "silu", adapters)

    def gelu_tanh_and_mul(self, gate_up: Projection) -> Tensor:
        """Return gelu(first half) * second half."""
        gate_up_TF, adapters = _parts(gate_up)
        return gated_activation(gate_up_TF, "gelu_tanh", adapters)

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
        """Return queries [T, H, D] in the cache's dtype, which attention would cast them to."""
        norms = rope = None
        if q_norm is not None and k_norm is not None:
            norms = HeadNorms(q_norm, k_norm, heads.eps, heads.norm_offset, heads.norm_rounds_last)
        if heads.rotation is not None:
            turn = heads.rotation
            rope = Rope(turn.cos, turn.sin, turn.dtype, heads.rope_rounds_last)
        if k.dtype != v.dtype:  # keys that were normalised as one projection, and promoted by its weight
            v = v.to(k.dtype)
        rows = inputs.positions_T, inputs.slot_mapping_T
        return rope_and_store(q, k, v, *rows, k_cache_NBKD, v_cache_NBKD, norms=norms, rope=rope, adapters=adapters)

    def paged_attention(
        self, q_THD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKW: Tensor, inputs: ForwardInputs, spec: AttentionSpec
    ) -> Tensor:
        """Attend decoding rows by splits of their keys, chunks by tiles of their queries; padding gives zeros."""
        q_THD = q_THD.to(k_cache_NBKD.dtype)
        caches = k_cache_NBKD, v_cache_NBKW
        n = inputs.num_decode
        scale, window, softcap = spec.scale, spec.window, spec.softcap
        decoded = None
        if n:
            rows, shared = (inputs.decode_block_tables_RM, inputs.decode_lens_R), inputs.shared
            if shared is not None and window is None:  # a window moves past the prefix, for each row by itself
                lists = shared.prefix_lens_R, shared.item_rows_IW
                decoded = prefix_attention(q_THD[:n], *caches, *rows, *lists, scale=scale, softcap=softcap)
            else:
                decoded = decode_attention(q_THD[:n], *caches, *rows, scale=scale, window=window, softcap=softcap)
            if n == q_THD.shape[0]:
                return decoded
        out = q_THD.new_zeros(q_THD.shape)
        if decoded is not None:
            out[:n] = decoded
        packed = inputs.packed_prefills
        if packed is not None:
            span = slice(n, n + packed.num_rows)
            chunks = packed.block_tables_SM, packed.starts_S1, packed.lens_S
            out[span] = prefill_attention(
                q_THD[span], *caches, *chunks, max_query_len=packed.longest, scale=scale, window=window, softcap=softcap
            )
        return out


def _parts(projection: Projection) -> tuple[Tensor, TailAdapters | None]:
    if isinstance(projection, Pending):
        return projection.y_TN, projection.adapters
    return projection, None


def _rows(x: Tensor) -> Tensor:
    """Return `x` as rows of its last dimension; those of a part of a wider matrix stay where they are."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
