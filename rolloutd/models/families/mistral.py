"""Mistral, and Mixtral with its experts: one window for all layers."""

from __future__ import annotations

from typing import Any

from rolloutd.models.description import DecoderConfig, ExpertNames, MoeConfig

from .base import describe, same_window


def mistral(hf: Any) -> DecoderConfig:
    """Return a Llama with a window, where the config has one."""
    return describe("MistralForCausalLM", hf, windows=same_window(hf))


def mixtral(hf: Any) -> DecoderConfig:
    """Return a Mistral with experts in every layer. Their weights in the mixture are normalised and stay in fp32."""
    moe = MoeConfig(
        layers=(True,) * hf.num_hidden_layers,
        num_experts=hf.num_local_experts,
        num_chosen=hf.num_experts_per_tok,
        expert_size=hf.intermediate_size,
        shared_size=None,
        normalize=True,
        weights_in_fp32=True,
        names=ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    )
    return describe("MixtralForCausalLM", hf, windows=same_window(hf), moe=moe)
