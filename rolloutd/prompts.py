"""What callers may pass as prompts and parameters, made uniform; shared by `LLM` and the client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from .errors import RequestError
from .outputs import RequestOutput
from .sampling_params import SamplingParams

Prompt: TypeAlias = "str | Sequence[int]"
"""A text, or token ids."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    """Return a list of prompts from one prompt or many; ids become plain ints."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}. Pass a str, a list of token ids, or a list of those."
        )
    if prompts and all(_is_id(item) for item in prompts):
        return [_as_ids(prompts)]
    return [item if isinstance(item, str) else _as_ids(item) for item in prompts]


def _is_id(item: object) -> bool:
    return hasattr(item, "__index__") and not isinstance(item, bool)


def _as_ids(prompt: object) -> list[int]:
    if not isinstance(prompt, Sequence) or not all(_is_id(item) for item in prompt):
        raise RequestError(
            f"a prompt is a {type(prompt).__name__} that is neither a str nor a list of ints. Pass token ids."
        )
    return [int(item) for item in prompt]


def as_sampling_params(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """Return one `SamplingParams` per prompt."""
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if len(sampling_params) != num_prompts:
        raise RequestError(
            f"{len(sampling_params)} sampling_params for {num_prompts} prompts. Pass one for all, or one per prompt."
        )
    for params in sampling_params:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params holds a {type(params).__name__}. Pass SamplingParams objects.")
    return list(sampling_params)


def score_requests(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], temperature: float
) -> tuple[list[list[int]], SamplingParams]:
    """Return the joined token ids and the parameters that score them without sampling."""
    if len(prompts) != len(completions):
        raise RequestError(
            f"{len(completions)} completions for {len(prompts)} prompts. Pass one completion per prompt."
        )
    for prompt, completion in zip(prompts, completions, strict=True):
        if not prompt or not completion:
            raise RequestError("score needs a prompt and a completion of at least one token each.")
    joined = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    return joined, SamplingParams(max_tokens=0, prompt_logprobs=1, temperature=temperature)


def scores_of(outputs: Sequence[RequestOutput], completions: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the completions' part of the prompt log-probabilities."""
    return [
        (output.prompt_logprobs or [])[-len(completion) :]
        for output, completion in zip(outputs, completions, strict=True)
    ]


def progress_bar(total: int, *, enabled: bool) -> Any:
    """Return a tqdm bar over completions, silent unless asked for and on a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc="generate", unit=" completions", disable=None if enabled else True)
