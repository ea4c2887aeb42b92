"""How far what an engine samples is from a plain forward of the trainer's model."""

from __future__ import annotations

from typing import Any

import torch

from rolloutd import LLM, SamplingParams


def largest_gap(
    llm: LLM, model: Any, prompts: list[list[int]], params: SamplingParams, adapter: str | None = None
) -> float:
    """Return max |log p difference| of fresh rollouts to a plain forward of `model`."""
    worst = 0.0
    for output in llm.generate(prompts, params, adapter=adapter):
        for completion in output.outputs:
            ids = torch.tensor([[*output.prompt_token_ids, *completion.token_ids]])
            with torch.no_grad():
                logp = torch.log_softmax(model(ids).logits[0, len(output.prompt_token_ids) - 1 : -1], -1)
            reference = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            worst = max(worst, float((reference - torch.tensor(completion.logprobs)).abs().max()))
    return worst
