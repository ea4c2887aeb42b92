"""How far every native family is from transformers, in fp32, on tiny models with attention that is far from uniform.

python -m tests.conformance.families            # the table, one line for each family and shape
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rolloutd import LLM, SamplingParams

KINDS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "olmo3",
    "granite",
    "smollm3",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
)
"""Every native family, by its name in `tests/tiny_models.py`."""
SHAPES: dict[str, dict[str, Any]] = {
    "head_dim 2, tied": {"hidden": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "tie": True},
    "head_dim 64, untied": {"hidden": 96, "heads": 6, "kv_heads": 2, "head_dim": 64, "tie": False},
}
REDUCED: dict[str, Any] = {"hidden": 128, "head_dim": 32, "layers": 3}
"""What reduced precision is measured on: deep and wide enough for its rounding to add up."""
MAX_LOGPROB_DIFFERENCE = 2e-5
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Row:
    """One model against transformers."""

    architecture: str
    num_tokens: int
    greedy: float
    """Largest |difference of log p| of greedily chosen tokens."""
    sampled: float
    """The same of tokens drawn at temperature 0.7."""
    wrong_tokens: tuple[str, ...]
    """Greedy tokens that `model.generate` does not choose, although no near-tie lets rounding decide."""

    @property
    def worst(self) -> float:
        return max(self.greedy, self.sampled)


def measure(folder: Path, *, num_prompts: int = 8, max_tokens: int = 8) -> Row:
    """Return how far rollouts of prompts of odd lengths in one batch are from transformers' own."""
    model, prompts = load(folder), prompts_of(512, count=num_prompts)
    with LLM(str(folder), max_model_len=128, max_num_seqs=64) as llm:
        architecture = llm.info.architecture
        greedy = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens))
        sampled = llm.generate(prompts, SamplingParams(temperature=0.7, max_tokens=max_tokens, seed=1))
    gaps: dict[float, list[float]] = {1.0: [], 0.7: []}
    wrong = []
    for outputs, temperature in ((greedy, 1.0), (sampled, 0.7)):
        for output in outputs:
            completion = output.outputs[0]
            prompt, tokens = output.prompt_token_ids, completion.token_ids
            reference = reference_logprobs(model, prompt, tokens, temperature)
            gaps[temperature].append(largest_difference(completion.logprobs, reference))
            if temperature == 1.0:
                wrong += wrong_greedy_tokens(model, prompt, tokens, max_tokens)
    return Row(
        architecture, sum(len(o.outputs[0].token_ids) for o in greedy), max(gaps[1.0]), max(gaps[0.7]), tuple(wrong)
    )


def prompts_of(vocab: int, *, count: int = 32, longest: int = 70, seed: int = 0) -> list[list[int]]:
    """Return prompts of odd lengths, 1 to `longest`."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randrange(1, longest, 2))] for _ in range(count)]


def load(folder: Path) -> PreTrainedModel:
    """Return the reference in fp32; transformers itself takes eager attention where SDPA would ignore a soft cap."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


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


def wrong_greedy_tokens(model: PreTrainedModel, prompt: list[int], completion: list[int], max_tokens: int) -> list[str]:
    """Return where the completion leaves that of `model.generate`, unless a near-tie lets rounding decide there."""
    reference = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
    )[0, len(prompt) :].tolist()
    if completion == reference:
        return []
    pairs = enumerate(zip(completion, reference, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(completion), len(reference)))
    top = reference_logits(model, [*prompt, *reference[:first]])[-1].topk(2).values
    if top[0] - top[1] < NEAR_TIE:
        return []
    return [f"token {first} of {completion} instead of {reference}"]


def sampled_difference(folder: Path, prompts: list[list[int]], *, max_tokens: int = 24, **options: Any) -> float:
    """Return the largest |difference of log p| of two samples of each prompt; `options` are the engine's."""
    with LLM(str(folder), max_num_seqs=32, **options) as llm:
        return rollout_difference(llm, load(folder), prompts, max_tokens=max_tokens)


def rollout_difference(llm: LLM, model: PreTrainedModel, prompts: list[list[int]], *, max_tokens: int = 24) -> float:
    """Return the largest |difference of log p| of two samples of each prompt to a plain forward of `model`."""
    worst = 0.0
    for output in llm.generate(prompts, SamplingParams(n=2, max_tokens=max_tokens, seed=3, ignore_eos=True)):
        for completion in output.outputs:
            reference = reference_logprobs(model, output.prompt_token_ids, completion.token_ids)
            worst = max(worst, largest_difference(completion.logprobs, reference))
    return worst


def reduced_precision_gaps(
    folder: Path, numerics: str, prompts: list[list[int]], **options: Any
) -> tuple[float, float]:
    """Return mean |difference of log p| to the trainer's forward in that mode, and of that forward to fp32."""
    dtype = torch.bfloat16 if numerics == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    exact = load(folder)
    with LLM(str(folder), numerics=numerics) as llm:
        assert llm.info.numerics == numerics
        outputs = llm.generate(prompts, SamplingParams(max_tokens=12, seed=2, ignore_eos=True))
    gaps, rounding = [], []
    for output in outputs:
        completion = output.outputs[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=numerics == "autocast"):
            trainer = reference_logprobs(model, output.prompt_token_ids, completion.token_ids)
        reference = reference_logprobs(exact, output.prompt_token_ids, completion.token_ids)
        gaps += [abs(a - b) for a, b in zip(completion.logprobs, trainer, strict=True)]
        rounding += [abs(a - b) for a, b in zip(trainer, reference, strict=True)]
    return sum(gaps) / len(gaps), sum(rounding) / len(rounding)


def main() -> None:
    """Print the table."""
    from tests.tiny_models import build

    print(f"{'architecture':24} {'shape':20} {'tokens':>6}  greedy   sampled")
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS:
            for shape, options in SHAPES.items():
                row = measure(build(kind, Path(scratch) / f"{kind} {shape}", extra_eos=4, **options))
                figures = f"{row.num_tokens:6}  {row.greedy:.1e}  {row.sampled:.1e}"
                print(f"{row.architecture:24} {shape:20} {figures}  {len(row.wrong_tokens)} wrong tokens")


if __name__ == "__main__":
    main()
