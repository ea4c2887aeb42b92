"""Beam search against transformers' own: the same sequences and scores."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rolloutd import LLM, SamplingParams
from tests.conformance.test_transformers import load

PROMPT_LENGTHS = (1, 5, 13, 16, 29)
PROMPTS_PER_LENGTH = 10
MAX_TOKENS = 8
MAX_SCORE_DIFFERENCE = 1e-4

Factory = Callable[..., Path]


@pytest.mark.parametrize(("width", "penalty", "early"), [(2, 1.0, False), (4, 0.0, False), (8, 1.0, True)])
def test_beams_equal_transformers(width: int, penalty: float, early: bool, tiny_model: Factory) -> None:
    folder = tiny_model("qwen2", extra_eos=40)
    model = load(folder)
    rng = random.Random(width)
    batches = [[[rng.randrange(512) for _ in range(n)] for _ in range(PROMPTS_PER_LENGTH)] for n in PROMPT_LENGTHS]
    params = SamplingParams(
        beam_width=width, n=width, max_tokens=MAX_TOKENS, length_penalty=penalty, early_stopping=early
    )
    with LLM(str(folder), max_model_len=64, max_num_seqs=128) as llm:
        outputs = iter(llm.generate([prompt for batch in batches for prompt in batch], params))
    num_stopped = 0
    for batch in batches:
        reference = model.generate(
            torch.tensor(batch),
            attention_mask=torch.ones(len(batch), len(batch[0]), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            length_penalty=penalty,
            early_stopping=early,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = reference.sequences_scores.view(len(batch), width)
        sequences = reference.sequences[:, len(batch[0]) :].view(len(batch), width, -1)
        for row in range(len(batch)):
            completions = next(outputs).outputs
            for rank, completion in enumerate(completions):
                assert abs((completion.beam_score or 0.0) - scores[row, rank]) < MAX_SCORE_DIFFERENCE
                others = scores[row][torch.arange(width) != rank]
                if (others - scores[row, rank]).abs().min() > MAX_SCORE_DIFFERENCE:  # else either may come first
                    expected = sequences[row, rank].tolist()
                    length = len(completion.token_ids)
                    assert completion.token_ids == expected[:length]
                    assert set(expected[length:]) <= {model.generation_config.pad_token_id}
                num_stopped += completion.finish_reason == "stop"
    assert num_stopped > 20
