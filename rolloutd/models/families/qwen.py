"""Qwen2 and Qwen2.5, Qwen3, and their mixtures of experts."""

from __future__ import annotations

from typing import Any

from rolloutd.models.description import DecoderConfig, ExpertNames, MoeConfig

from .base import describe, same_window, windows_by_type


def qwen2(hf: Any) -> DecoderConfig:
    """Return a Llama with biases on query, key and value."""
    return describe("Qwen2ForCausalLM", hf, qkv_bias=True, windows=windows_by_type("Qwen2ForCausalLM", hf))


def qwen3(hf: Any) -> DecoderConfig:
    """Return a Llama whose query and key heads are normalised."""
    bias, windows = bool(hf.attention_bias), windows_by_type("Qwen3ForCausalLM", hf)
    return describe("Qwen3ForCausalLM", hf, qkv_bias=bias, o_bias=bias, qk_norm="head", windows=windows)


def qwen2_moe(hf: Any) -> DecoderConfig:
    """Return a Qwen2 with experts and a shared expert; `qkv_bias` says whether there are biases."""
    name = "Qwen2MoeForCausalLM"
    moe = _experts(hf, shared_size=hf.shared_expert_intermediate_size)
    return describe(name, hf, qkv_bias=bool(hf.qkv_bias), windows=windows_by_type(name, hf), moe=moe)


def qwen3_moe(hf: Any) -> DecoderConfig:
    """Return a Qwen3 with experts; a window, where the config uses one, holds for all layers."""
    bias, moe = bool(hf.attention_bias), _experts(hf, shared_size=None)
    return describe(
        "Qwen3MoeForCausalLM", hf, qkv_bias=bias, o_bias=bias, qk_norm="head", windows=same_window(hf), moe=moe
    )


def _experts(hf: Any, *, shared_size: int | None) -> MoeConfig | None:
    """Return the mixture; None where no layer has one."""
    dense = set(hf.mlp_only_layers or ())
    layers = tuple(
        i not in dense and hf.num_experts > 0 and (i + 1) % hf.decoder_sparse_step == 0
        for i in range(hf.num_hidden_layers)
    )
    if not any(layers):
        return None
    return MoeConfig(
        layers=layers,
        num_experts=hf.num_experts,
        num_chosen=hf.num_experts_per_tok,
        expert_size=hf.moe_intermediate_size,
        shared_size=shared_size,
        normalize=bool(hf.norm_topk_prob),
        weights_in_fp32=False,
        names=ExpertNames(),
    )
