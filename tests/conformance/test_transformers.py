"""Tokens and log-probabilities against transformers in fp32, on tiny models with attention that is far from uniform."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rolloutd import LLM, SamplingParams

KINDS = ("llama", "mistral", "qwen2", "qwen3")
SHAPES: dict[str, dict[str, Any]] = {
    "head_dim 2, tied": {"hidden": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "tie": True},
    "head_dim 2, untied": {"hidden": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "tie": False},
    "head_dim 64, tied": {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "tie": True},
    "head_dim 64, untied": {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "tie": False},
}
MAX_LOGPROB_DIFFERENCE = 2e-5
NEAR_TIE = 1e-4

Factory = Callable[..., Path]


def prompts_of(vocab: int, *, count: int = 32, longest: int = 70, seed: int = 0) -> list[list[int]]:
    """Return prompts of odd lengths, 1 to `longest`."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randrange(1, longest, 2))] for _ in range(count)]


def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Return [T, V] of a plain forward over one unpadded sequence."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float()


def reference_logprobs(
    model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> list[float]:
    """Return log p of the completion's tokens by a plain forward."""
    logits = reference_logits(model, [*prompt, *completion])[len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits / temperature, dim=-1)
    values: list[float] = logp.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()
    return values


def largest_difference(ours: list[float], reference: list[float]) -> float:
    assert len(ours) == len(reference)
    return max(abs(a - b) for a, b in zip(ours, reference, strict=True))


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def assert_greedy(model: PreTrainedModel, prompt: list[int], completion: list[int], max_tokens: int) -> None:
    """Assert the tokens of `model.generate`, where no near-tie lets rounding decide."""
    reference = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
    )[0, len(prompt) :].tolist()
    if completion != reference:
        first = next(i for i, (a, b) in enumerate(zip(completion, reference, strict=False)) if a != b)
        top = reference_logits(model, [*prompt, *reference[:first]])[-1].topk(2).values
        assert top[0] - top[1] < NEAR_TIE, f"token {first}: {completion[first]} instead of {reference[first]}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_and_logprobs_equal_transformers(kind: str, shape: str, tiny_model: Factory) -> None:
    folder = tiny_model(kind, **SHAPES[shape], extra_eos=4)
    model = load(folder)
    prompts = prompts_of(512)
    with LLM(str(folder), max_model_len=128, max_num_seqs=64) as llm:
        greedy = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12))
        sampled = llm.generate(prompts, SamplingParams(temperature=0.7, max_tokens=12, seed=1))
    worst = 0.0
    for prompt, output in zip(prompts, greedy, strict=True):
        completion = output.outputs[0]
        assert_greedy(model, prompt, completion.token_ids, 12)
        worst = max(
            worst, largest_difference(completion.logprobs, reference_logprobs(model, prompt, completion.token_ids))
        )
        assert completion.sampling_logprobs == [0.0] * len(completion.token_ids)
    for prompt, output in zip(prompts, sampled, strict=True):
        completion = output.outputs[0]
        reference = reference_logprobs(model, prompt, completion.token_ids, temperature=0.7)
        worst = max(worst, largest_difference(completion.logprobs, reference))
        assert completion.sampling_logprobs == completion.logprobs
    assert worst <= MAX_LOGPROB_DIFFERENCE


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


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rope_equals_transformers(rope: str, tiny_model: Factory) -> None:
    folder = tiny_model("llama", max_len=256, rope_parameters=ROPES[rope])
    assert_sampled_logprobs(folder, prompts_of(512, count=6, longest=200))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"kv_heads": 4}),
        ("llama", {"kv_heads": 1, "head_dim": 24}),
    ],
)
def test_family_options_equal_transformers(kind: str, options: dict[str, Any], tiny_model: Factory) -> None:
    assert_sampled_logprobs(tiny_model(kind, **options), prompts_of(512, count=8))


def assert_sampled_logprobs(folder: Path, prompts: list[list[int]], **options: Any) -> None:
    model = load(folder)
    with LLM(str(folder), max_num_seqs=32, **options) as llm:
        outputs = llm.generate(prompts, SamplingParams(n=2, max_tokens=24, seed=3, ignore_eos=True))
    worst = 0.0
    for output in outputs:
        for completion in output.outputs:
            reference = reference_logprobs(model, output.prompt_token_ids, completion.token_ids)
            worst = max(worst, largest_difference(completion.logprobs, reference))
    assert worst <= MAX_LOGPROB_DIFFERENCE


def test_chunks_prefixes_and_preemption_do_not_change_numbers(tiny_model: Factory) -> None:
    folder = tiny_model("qwen2")
    stem = prompts_of(512, count=1, longest=60, seed=5)[0] * 3
    prompts = [[*stem, *prompt] for prompt in prompts_of(512, count=12, longest=20, seed=6)]
    assert_sampled_logprobs(folder, prompts, max_num_batched_tokens=37)
    block_bytes = 2 * 2 * 16 * 2 * 16 * 4
    assert_sampled_logprobs(folder, prompts, max_model_len=256, kv_cache_bytes=20 * block_bytes)


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
    """The mean gap to the trainer's own forward in that mode is far below that between bf16 and fp32."""
    folder = tiny_model("qwen2", hidden=128, head_dim=32, layers=3)
    dtype = torch.bfloat16 if numerics == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    exact = load(folder)
    prompts = prompts_of(512, count=12)
    with LLM(str(folder), numerics=numerics) as llm:
        assert llm.info.numerics == numerics
        outputs = llm.generate(prompts, SamplingParams(max_tokens=16, seed=2, ignore_eos=True))
    gaps, rounding = [], []
    for output in outputs:
        completion = output.outputs[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=numerics == "autocast"):
            trainer = reference_logprobs(model, output.prompt_token_ids, completion.token_ids)
        reference = reference_logprobs(exact, output.prompt_token_ids, completion.token_ids)
        gaps += [abs(a - b) for a, b in zip(completion.logprobs, trainer, strict=True)]
        rounding += [abs(a - b) for a, b in zip(trainer, reference, strict=True)]
    mean_gap, mean_rounding = sum(gaps) / len(gaps), sum(rounding) / len(rounding)
    assert mean_gap < 0.5 * mean_rounding
