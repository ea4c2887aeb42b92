"""Tokens and log-probabilities against transformers, for every native family, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rolloutd import LLM, SamplingParams
from rolloutd.errors import LoraUnsupported, ManifestMismatch
from rolloutd.models.config import SUPPORTED_ARCHITECTURES
from rolloutd.runtime import ops
from tests.conformance.families import (
    KINDS,
    MAX_LOGPROB_DIFFERENCE,
    REDUCED,
    SHAPES,
    largest_difference,
    load,
    measure,
    prompts_of,
    reduced_precision_gaps,
    reference_logprobs,
    rollout_difference,
    sampled_difference,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MIXTURES = ("qwen2_moe", "qwen3_moe", "mixtral")
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 3.0],
    "long_factor": [9.0] * 6,
    "original_max_position_embeddings": 256,
}

Factory = Callable[..., Path]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_and_logprobs_equal_transformers(kind: str, shape: str, tiny_model: Factory) -> None:
    row = measure(tiny_model(kind, **SHAPES[shape], extra_eos=4))
    assert row.num_tokens > 30
    assert row.wrong_tokens == ()
    assert row.worst <= MAX_LOGPROB_DIFFERENCE


def test_no_family_is_left_out(tiny_model: Factory) -> None:
    built = {json.loads((tiny_model(kind) / "config.json").read_text())["architectures"][0] for kind in KINDS}
    assert built == set(SUPPORTED_ARCHITECTURES)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500000.0,
    },
}


FULL_LAYERS_SCALED = {
    kind: {"sliding_attention": {"rope_type": "default", "rope_theta": 20000.0}, "full_attention": ROPES[kind]}
    for kind in ("linear", "yarn")
}
"""What the larger models of Gemma 3 and OLMo 3 have."""


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rope_equals_transformers(rope: str, tiny_model: Factory) -> None:
    folder = tiny_model("llama", max_len=256, rope_parameters=ROPES[rope])
    assert sampled_difference(folder, prompts_of(512, count=6, longest=200)) <= MAX_LOGPROB_DIFFERENCE


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"kv_heads": 4}),
        ("llama", {"kv_heads": 1, "head_dim": 24}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("gemma2", {"attention_bias": True, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma3_text", {"final_logit_softcapping": 4.0, "attention_bias": True}),
        ("gemma3_text", {"rope_parameters": FULL_LAYERS_SCALED["linear"]}),
        ("olmo3", {"rope_parameters": FULL_LAYERS_SCALED["yarn"], "layers": 3}),
        ("phi3", {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 256}),
        ("olmo2", {"attention_bias": True, "kv_heads": 4}),
        ("granite", {"attention_bias": True, "mlp_bias": True}),
        ("smollm3", {"attention_bias": True, "mlp_bias": True, "use_sliding_window": False, "sliding_window": None}),
        ("qwen2_moe", {"layers": 3, "decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen3_moe", {"layers": 3, "mlp_only_layers": [1], "norm_topk_prob": False, "attention_bias": True}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}),
        ("mixtral", {"sliding_window": None, "num_experts_per_tok": 1}),
    ],
)
def test_family_options_equal_transformers(kind: str, options: dict[str, Any], tiny_model: Factory) -> None:
    folder = tiny_model(kind, **options)
    assert sampled_difference(folder, prompts_of(512, count=8), max_model_len=256) <= MAX_LOGPROB_DIFFERENCE


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_prefixes_and_preemption_do_not_change_numbers(kind: str, tiny_model: Factory) -> None:
    folder = tiny_model(kind)
    stem = prompts_of(512, count=1, longest=60, seed=5)[0] * 3
    prompts = [[*stem, *prompt] for prompt in prompts_of(512, count=5, longest=20, seed=6)]
    model = load(folder)
    block_bytes = 2 * 2 * 16 * 2 * 16 * 4
    for options in ({"max_num_batched_tokens": 37}, {"max_model_len": 256, "kv_cache_bytes": 17 * block_bytes}):
        with LLM(str(folder), max_num_seqs=32, **options) as llm:
            assert rollout_difference(llm, model, prompts, max_tokens=16) <= MAX_LOGPROB_DIFFERENCE
            stats = llm.stats()
            assert stats.cached_tokens > 0
            assert "kv_cache_bytes" not in options or stats.num_preemptions > 0


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "qwen2_moe", "mixtral"])
def test_deterministic_ops_hold_for_what_families_add(kind: str, tiny_model: Factory) -> None:
    """Experts, gates and activations too: bits do not depend on the batch, on chunks or on cached prefixes."""
    folder, prompts = str(tiny_model(kind, intermediate=101)), prompts_of(512, count=6)
    params = SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
    results = []
    for options in ({}, {"max_num_batched_tokens": 19, "max_num_seqs": 4}, {"enable_prefix_caching": False}):
        with LLM(folder, max_model_len=128, deterministic=True, **options) as llm:
            parts = [prompts] if options else [[prompt] for prompt in prompts]
            outputs = [output.outputs[0] for part in parts for output in llm.generate(part, params)]
        results.append([(output.token_ids, output.logprobs) for output in outputs])
    assert results[0] == results[1] == results[2]


def changed(folder: Path) -> PreTrainedModel:
    """Return the model after a change of every parameter, as a step of training makes it."""
    model, generator = load(folder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_serves_the_trainers_numbers(kind: str, tiny_model: Factory, tmp_path: Path) -> None:
    """Under the names of the live module, and under those of a checkpoint where they differ."""
    folder, prompts = tiny_model(kind, tie=True), prompts_of(512, count=4)
    model = changed(folder)
    with LLM(str(folder), max_model_len=128) as llm:
        before = llm.info.num_parameters
        assert rollout_difference(llm, model, prompts, max_tokens=8) > 0.01, "the changed model differs"
        llm.update_weights(model.named_parameters())
        assert rollout_difference(llm, model, prompts, max_tokens=8) <= MAX_LOGPROB_DIFFERENCE
        assert before == sum(parameter.numel() for parameter in model.parameters())
        if kind in MIXTURES:
            llm.update_weights(load(folder).named_parameters())
            model.save_pretrained(tmp_path)
            llm.update_weights(load_file(tmp_path / "model.safetensors"))
            assert rollout_difference(llm, model, prompts, max_tokens=8) <= MAX_LOGPROB_DIFFERENCE


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_missing_piece_of_the_experts_is_named(kind: str, tiny_model: Factory) -> None:
    folder = tiny_model(kind)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if ".experts.3." in name)
    del tensors[lost]
    with LLM(str(folder), max_model_len=128) as llm:
        with pytest.raises(ManifestMismatch, match=f"1 of .*: {lost}"):
            llm.update_weights(tensors)
        live = dict(load(folder).named_parameters())
        del live["model.layers.1.mlp.experts.down_proj"]
        with pytest.raises(ManifestMismatch, match=r"1 of .*: model\.layers\.1\.mlp\.experts\.down_proj"):
            llm.update_weights(live)


def adapted(folder: Path, targets: Any) -> Any:
    """Return a PEFT model whose adapter is far from zero."""
    model = get_peft_model(load(folder), LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_every_linear_layer_serves_the_peft_models_numbers(kind: str, tiny_model: Factory) -> None:
    folder, prompts = tiny_model(kind), prompts_of(512, count=4)
    model = adapted(folder, ATTENTION if kind in ("qwen3_moe", "mixtral") else "all-linear")
    adapter = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with LLM(str(folder), max_model_len=128) as llm:
        assert rollout_difference(llm, model, prompts, max_tokens=8) > 0.01, "the adapter changes the numbers"
        llm.update_lora(adapter, model.peft_config["default"], mode="exact")
        assert rollout_difference(llm, model, prompts, max_tokens=8) <= MAX_LOGPROB_DIFFERENCE
        llm.update_lora(adapter, model.peft_config["default"], mode="merged")
        assert rollout_difference(llm, model, prompts, max_tokens=8) <= MAX_LOGPROB_DIFFERENCE


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_an_adapter_on_experts_is_refused(kind: str, tiny_model: Factory) -> None:
    folder = tiny_model(kind)
    model = adapted(folder, "all-linear")
    adapter = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with (
        LLM(str(folder), max_model_len=128) as llm,
        pytest.raises(LoraUnsupported, match=r"target_parameters=.*down_proj"),
    ):
        llm.update_lora(adapter, model.peft_config["default"])


def test_scores_equal_a_plain_forward(tiny_model: Factory) -> None:
    folder = tiny_model("qwen3")
    model = load(folder)
    prompts = prompts_of(512, count=6)
    completions = prompts_of(512, count=6, seed=1)
    with LLM(str(folder), max_num_batched_tokens=50) as llm:
        scores = llm.score(prompts, completions, temperature=0.8)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        reference = reference_logprobs(model, prompt, completion, temperature=0.8)
        assert largest_difference(score, reference) <= MAX_LOGPROB_DIFFERENCE


@pytest.mark.parametrize("numerics", ["bf16", "autocast"])
def test_reduced_precision_follows_the_trainer(numerics: str, tiny_model: Factory) -> None:
    """The mean gap to the trainer's own forward in that mode is well below that between bf16 and fp32.

    Measured with oneDNN held to AVX2, to AVX-512, and with AMX: 0.42 to 0.50 of it.
    """
    gap, rounding = reduced_precision_gaps(tiny_model("qwen2", **REDUCED), numerics, prompts_of(512, count=24))
    assert gap < 0.6 * rounding


@pytest.mark.parametrize("numerics", ["bf16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_rounded_where_the_trainer_rounds_them(
    kind: str, numerics: str, tiny_model: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same attention as transformers' eager one, hardly a bit differs, so no other cast may either."""
    monkeypatch.setattr(ops, "_attend", attend_eagerly)
    prompts = prompts_of(512, count=4)
    gap, rounding = reduced_precision_gaps(tiny_model(kind, **REDUCED), numerics, prompts, attn_implementation="eager")
    assert gap < 0.1 * rounding


def attend_eagerly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, spec: ops.AttentionSpec
) -> torch.Tensor:
    """Return attention as the eager functions of transformers' models compute it."""
    repeats = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
    scores = q @ k.transpose(-1, -2) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
