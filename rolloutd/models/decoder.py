"""Every native family as one function of weights, inputs and KV cache; `DecoderConfig` says what is switched on.

Shapes as in runtime/ops.py. Values are rounded where transformers rounds them: see `Precision`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rolloutd.runtime.inputs import ForwardInputs, LastRows
from rolloutd.runtime.kv_cache import KVCache
from rolloutd.runtime.ops import AttentionSpec, HeadSpec, Ops, Pending, Projection, Rotation, completed
from rolloutd.weights.packing import DecoderWeights, LayerWeights, Linear, Mlp

from .description import DecoderConfig
from .experts import mix_experts
from .rotary import RotaryTable


def forward(
    config: DecoderConfig,
    ops: Ops,
    weights: DecoderWeights,
    rotary: tuple[RotaryTable, ...],
    inputs: ForwardInputs,
    cache: KVCache,
) -> Tensor:
    """Return the hidden state before the head, and write the step's keys and values to `cache`.

    Of the last layer only keys and values are needed of every token: the rest of it is computed for `inputs.last_rows`,
    where there are some.
    """
    x_TE = ops.embed(inputs.token_ids_T, weights.embedding, _embedding_scale(config, weights.embedding.dtype))
    dtype = torch.float32 if config.rope_rounds_last else x_TE.dtype
    rotations = tuple(Rotation(table.cos, table.sin, inputs.positions_T, dtype) for table in rotary)
    step = _Step(config, ops, inputs, cache, rotations)
    # Each norm but the first follows an addition to the residual stream: they are one op.
    following = [*(layer.attention_norm for layer in weights.layers[1:]), weights.final_norm]
    h_TE = step.norm(x_TE, weights.layers[0].attention_norm)
    for i, (layer, next_norm) in enumerate(zip(weights.layers, following, strict=True)):
        last = inputs.last_rows if i == len(weights.layers) - 1 else None
        attended_TN = step.attention(i, layer, h_TE, last)
        if last is not None:
            x_TE = x_TE[last.rows_R]
        out = step.into_residual(attended_TN, layer.o, layer.post_attention_norm)
        h_TE, x_TE = step.add_and_norm(out, x_TE, layer.mlp_norm)
        out = step.feed_forward(h_TE, layer)
        h_TE, x_TE = step.add_and_norm(out, x_TE, next_norm)
    return h_TE


def logits(config: DecoderConfig, ops: Ops, weights: DecoderWeights, hidden_RE: Tensor) -> Tensor:
    """Return logits [R, V] of rows of the hidden state, in the head's dtype."""
    logits_RV = ops.linear(hidden_RE, Linear(weights.head, None))
    if config.logits_divisor != 1.0:
        logits_RV = logits_RV / config.logits_divisor
    if config.logits_softcap is not None:
        logits_RV = torch.tanh(logits_RV / config.logits_softcap) * config.logits_softcap
    return logits_RV


def _embedding_scale(config: DecoderConfig, dtype: torch.dtype) -> float:
    return _rounded(config.embedding_scale, dtype) if config.embedding_scale_rounds else config.embedding_scale


@cache
def _rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=dtype))


@dataclass(frozen=True, slots=True)
class _Step:
    """The parts of a layer, over the tokens of one step."""

    config: DecoderConfig
    ops: Ops
    inputs: ForwardInputs
    cache: KVCache
    rotations: tuple[Rotation, ...]
    """Of the step's positions, for each of `config.ropes`."""

    def norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return `x` normalised over its last dimension, or as it is where the family has no norm."""
        if weight is None:
            return x
        c = self.config
        return self.ops.rms_norm(x, weight, c.rms_norm_eps, offset=c.norm_offset, rounds_last=c.norm_rounds_last)

    def into_residual(self, x: Tensor, last: Linear, post_norm: Tensor | None) -> Projection:
        """Return what a block adds to the residual stream, by its last product.

        The addition can take adapters along only where it reads the product itself.
        """
        if post_norm is None and self.config.residual_scale == 1.0:
            return self.ops.project(x, last)
        return self.scaled(self.norm(self.ops.linear(x, last), post_norm))

    def scaled(self, out_TE: Tensor) -> Tensor:
        """Return a block's output times the family's factor."""
        scale = self.config.residual_scale
        return out_TE if scale == 1.0 else out_TE * scale

    def add_and_norm(self, out: Projection, x_TE: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the residual stream with a block's output added: normalised, and as it is."""
        c = self.config
        if weight is None:
            x_TE = x_TE + completed(out, x_TE.shape[1])
            return x_TE, x_TE
        return self.ops.add_rms_norm(
            out, x_TE, weight, c.rms_norm_eps, offset=c.norm_offset, rounds_last=c.norm_rounds_last
        )

    def feed_forward(self, h_TE: Tensor, layer: LayerWeights) -> Projection:
        """Return the output of the MLP, or of the mixture of experts that stands in its place."""
        mlp, post_norm, most = layer.mlp, layer.post_mlp_norm, self.ops.rows_of_mlp
        if not isinstance(mlp, Mlp):
            assert self.config.moe is not None
            out_TE = mix_experts(self.config.moe, self.ops, mlp, h_TE, self.expert)
        elif most is None or len(h_TE) <= most:
            return self.into_residual(self.gated(h_TE, mlp), mlp.down, post_norm)
        else:
            out_TE = torch.cat([self.expert(part_TE, mlp) for part_TE in torch.split(h_TE, most)])
        return self.scaled(self.norm(out_TE, post_norm))

    def gated(self, h_TE: Tensor, weights: Mlp) -> Tensor:
        """Return activation(gate) * up."""
        ops, gate_up = self.ops, self.ops.project(h_TE, weights.gate_up)
        return ops.silu_and_mul(gate_up) if self.config.activation == "silu" else ops.gelu_tanh_and_mul(gate_up)

    def expert(self, h_TE: Tensor, weights: Mlp) -> Tensor:
        """Return the output of one expert, or of the MLP."""
        return self.ops.linear(self.gated(h_TE, weights), weights.down)

    def attention(self, index: int, layer: LayerWeights, h_TE: Tensor, last: LastRows | None) -> Tensor:
        """Return what the heads of layer number `index` attend to, side by side, before the output projection.

        Keys and values of all rows are stored; where `last` is given, only these rows attend.
        """
        c, ops = self.config, self.ops
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        qkv = ops.linear(h_TE, layer.qkv) if c.qk_norm == "projection" else ops.project(h_TE, layer.qkv)
        qkv_TN, adapters = (qkv.y_TN, qkv.adapters) if isinstance(qkv, Pending) else (qkv, None)
        q, k, v = torch.split(qkv_TN, [q_size, kv_size, kv_size], dim=1)
        q_norm, k_norm = layer.q_norm, layer.k_norm
        if c.qk_norm == "projection":
            q, k = self.norm(q, q_norm), self.norm(k, k_norm)
            q_norm = k_norm = None
        rope = c.rope_of_layer[index]
        heads = HeadSpec(
            head_dim=c.head_dim,
            eps=c.rms_norm_eps,
            norm_offset=c.norm_offset,
            norm_rounds_last=c.norm_rounds_last,
            rotation=None if rope is None else self.rotations[rope],
            rope_rounds_last=c.rope_rounds_last,
        )
        keys, values = self.cache.keys[index], self.cache.values[index]
        q_THD = ops.rope_and_store(q, k, v, q_norm, k_norm, keys, values, self.inputs, heads, adapters)
        spec = AttentionSpec(scale=c.attention_scale, window=c.windows[index], softcap=c.attention_softcap)
        queries, inputs = (q_THD, self.inputs) if last is None else (q_THD[last.rows_R], last.inputs)
        return ops.paged_attention(queries, keys, values, inputs, spec).flatten(1)
