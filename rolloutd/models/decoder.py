"""The Llama family (Llama, Mistral, Qwen2, Qwen3) as one function of weights, inputs and KV cache.

Shapes as in runtime/ops.py. Values are rounded where transformers rounds them: see `Precision`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rolloutd.errors import ConfigError
from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.kv_cache import KVCache
from rolloutd.runtime.ops import AttentionSpec, Ops
from rolloutd.weights.packing import DecoderWeights, LayerWeights, Linear

from .config import DecoderConfig, RopeConfig


@dataclass(frozen=True)
class RotaryTable:
    """cos and sin of every position, [max_model_len, 1, D], fp32."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, config: DecoderConfig, max_model_len: int, device: torch.device) -> RotaryTable:
        """Return the tables up to `max_model_len`; `ConfigError` where a dynamic RoPE would change on the way."""
        frequencies, scaling = _frequencies(config.rope, config.head_dim, max_model_len)
        positions = torch.arange(max_model_len, dtype=torch.float32)
        angles = (positions[:, None] * frequencies.float()[None, :]).repeat(1, 2)[:, None, :]
        return cls((angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device))


def _frequencies(rope: RopeConfig, head_dim: int, max_model_len: int) -> tuple[Tensor, float]:
    """Return inverse frequencies [D / 2] and the factor of cos and sin; the scaled kinds come from transformers."""
    limit = rope.hf_config.max_position_embeddings
    if rope.rope_type == "dynamic" and max_model_len > limit:
        raise ConfigError(
            f"max_model_len={max_model_len} > {limit}: a dynamic RoPE changes its frequencies beyond that, "
            f"also those of tokens already cached. Use --max-model-len {limit} or less."
        )
    if rope.rope_type in ("default", "dynamic"):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / rope.theta**exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope.rope_type](rope.hf_config, torch.device("cpu"))
    return frequencies, float(scaling)


def forward(
    config: DecoderConfig,
    ops: Ops,
    weights: DecoderWeights,
    rotary: RotaryTable,
    inputs: ForwardInputs,
    cache: KVCache,
) -> Tensor:
    """Return the hidden state before the head, [T, E], and write the step's keys and values to `cache`."""
    x_TE = F.embedding(inputs.token_ids_T, weights.embedding)
    cos = rotary.cos[inputs.positions_T].to(x_TE.dtype)
    sin = rotary.sin[inputs.positions_T].to(x_TE.dtype)
    for i, layer in enumerate(weights.layers):
        h_TE = ops.rms_norm(x_TE, layer.attention_norm, config.rms_norm_eps)
        x_TE = x_TE + _attention(config, ops, i, layer, h_TE, (cos, sin), inputs, cache)
        h_TE = ops.rms_norm(x_TE, layer.mlp_norm, config.rms_norm_eps)
        x_TE = x_TE + ops.linear(ops.silu_and_mul(ops.linear(h_TE, layer.gate_up)), layer.down)
    return ops.rms_norm(x_TE, weights.final_norm, config.rms_norm_eps)


def _attention(
    config: DecoderConfig,
    ops: Ops,
    index: int,
    layer: LayerWeights,
    h_TE: Tensor,
    rotary: tuple[Tensor, Tensor],
    inputs: ForwardInputs,
    cache: KVCache,
) -> Tensor:
    """Return the attention block's output [T, E] for layer number `index`."""
    num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    qkv_THD = ops.linear(h_TE, layer.qkv).view(-1, num_heads + 2 * num_kv_heads, head_dim)
    q_THD, k_TKD, v_TKD = torch.split(qkv_THD, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q_THD = ops.rms_norm(q_THD, layer.q_norm, config.rms_norm_eps)
        k_TKD = ops.rms_norm(k_TKD, layer.k_norm, config.rms_norm_eps)
    q_THD, k_TKD = ops.rotate(q_THD, *rotary), ops.rotate(k_TKD, *rotary)
    keys, values = cache.keys[index], cache.values[index]
    ops.store_kv(k_TKD, v_TKD, keys, values, inputs)
    spec = AttentionSpec(scale=head_dim**-0.5, window=config.windows[index])
    out_THD = ops.paged_attention(q_THD, keys, values, inputs, spec)
    return ops.linear(out_THD.flatten(1), layer.o)


def logits(ops: Ops, weights: DecoderWeights, hidden_RE: Tensor) -> Tensor:
    """Return logits [R, V] in fp32 of rows of the hidden state."""
    return ops.linear(hidden_RE, Linear(weights.head, None)).float()
