"""Tiny models of architectures that have no native decoder, one for each thing that a fallback can get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tests.tiny_models import _fill

VOCAB = 512
EXTRA_STOPS = [252, 253, 254, 255]

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES: dict[str, dict[str, Any]] = {
    # learned positions, Conv1D for Linear, tied head
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    # learned positions with an offset, LayerNorm with bias, a projection after the embedding
    "opt": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 96,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 256,
    },
    # query, key and value in one matrix, part of each head rotated, parallel residual, a head of another name
    "gpt_neox": {
        **_LLAMA_LIKE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    },
    # sliding layers with RoPE and full ones without, parallel block, scaled logits
    "cohere2": {**_LLAMA_LIKE, "num_hidden_layers": 4, "sliding_window": 16, "logit_scale": 0.3},
    # every layer sliding, biases
    "starcoder2": {**_LLAMA_LIKE, "sliding_window": 16},
    # a head with bias, partial rotary
    "phi": _LLAMA_LIKE,
    # squared ReLU without a gate, norms with 1 + weight
    "nemotron": _LLAMA_LIKE,
    # interleaved RoPE, post-norms, fused gate and up
    "glm4": {**_LLAMA_LIKE, "head_dim": 16},
    # capped scores and logits, scaled embedding
    "vaultgemma": {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 32},
    # scaled embedding, residual and hidden state before the head, keys wider than values
    "minicpm3": {
        **_LLAMA_LIKE,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
    },
    # latent attention, routed and shared experts with a correction bias that is a buffer
    "deepseek_v3": {
        **_LLAMA_LIKE,
        **_EXPERTS,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    # experts one by one in the checkpoint and fused in the module, norms of query and key
    "olmoe": {**_LLAMA_LIKE, **_EXPERTS, "num_experts": 4},
    # scaled logits and residual, experts
    "granitemoe": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 1.5},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_oss": ({**_LLAMA_LIKE, "head_dim": 16, "num_local_experts": 4}, "sinks"),
    "mamba": ({"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, "recurrent state"),
    "bloom": ({"hidden_size": 64, "n_layer": 2, "n_head": 4}, "position_ids"),
    "gptj": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 256}, "attention interface"),
    "minimax": (
        {**_LLAMA_LIKE, "head_dim": 16, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
        "state of its own",
    ),
    "llama4_text": (
        {
            **_LLAMA_LIKE,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "attention_chunk_size": 32,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "neither causal nor a sliding window",
    ),
}
"""Config and a word of the reason."""


def build_fallback(kind: str, out_dir: Path, options: dict[str, Any], *, seed: int = 0) -> Path:
    """Write a model of this kind to `out_dir`, with noise in every parameter, and return that folder."""
    config = AutoConfig.for_model(
        kind, **{"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, **options}
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    _fill(model, seed=seed, tied=config.tie_word_embeddings)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.3, 0.3, buffer.numel()))
    model.generation_config = GenerationConfig(eos_token_id=[0, *EXTRA_STOPS], pad_token_id=0)
    model.eval().save_pretrained(out_dir)
    return out_dir
