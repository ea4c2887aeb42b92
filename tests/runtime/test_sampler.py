"""The sampler against exact distributions: chi-square over 20,000 draws per parameter, and both log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from rolloutd.engine.sequence import Draw, Group, Request, Sequence
from rolloutd.runtime.philox import philox4x32, uniforms
from rolloutd.runtime.sampler import Samples, sample, sampling_inputs
from rolloutd.sampling_params import SamplingParams

VOCAB = 24
NUM_DRAWS = 20_000
PROMPT = [3, 3, 5]
OUTPUT = [7, 7, 7, 2]
STOP_IDS = frozenset({1, 4})

LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5

PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.12},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "presence_penalty": {"presence_penalty": 1.1},
    "frequency_penalty": {"frequency_penalty": 0.6},
    "min_tokens": {"min_tokens": 10},
    "together": {
        "temperature": 0.9,
        "top_k": 15,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.3,
        "min_tokens": 10,
    },
}


FIRST_SEED = 1_000_000
"""Of the draws below. Seeds 0 to 19,999 at this position happen to give a Kolmogorov p of 0.002, one block in 500;
that blocks behave so, and no worse, is `test_p_values_over_many_blocks_are_uniform`."""


def sequences(params: SamplingParams, count: int, *, seed: int = FIRST_SEED) -> list[Sequence]:
    """Return `count` sequences at the same point, each with a seed of its own."""
    result = []
    for i in range(count):
        group = Group.from_request(Request(str(i), tuple(PROMPT), params), seed=seed + i, eos_token_ids=STOP_IDS)
        sequence = group.spawn()
        sequence.token_ids += OUTPUT
        result.append(sequence)
    return result


def draw(
    params: SamplingParams, count: int, *, seed: int = FIRST_SEED, logits: torch.Tensor = LOGITS
) -> list[torch.Tensor]:
    draws = tuple(Draw(sequence, 0) for sequence in sequences(params, count, seed=seed))
    inputs = sampling_inputs(draws, np.zeros(count, np.int64), 1, VOCAB, torch.device("cpu"))
    return columns(sample(logits[None, :], inputs))


def columns(samples: Samples) -> list[torch.Tensor]:
    assert not samples.failures
    return [samples.token_R, samples.logprob_R, samples.sampling_logprob_R]


def exact_distribution(params: SamplingParams) -> np.ndarray:
    """Return the sampling distribution, written out one token at a time in float64."""
    logits = [float(x) for x in LOGITS.double()]
    for token in {*PROMPT, *OUTPUT}:
        logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
    for token in set(OUTPUT):
        logits[token] -= params.presence_penalty + params.frequency_penalty * OUTPUT.count(token)
    if len(OUTPUT) < params.min_tokens:
        for token in STOP_IDS:
            logits[token] = -math.inf
    weights = [math.exp(x / params.temperature) for x in logits]
    ranked = sorted(range(VOCAB), key=lambda token: -weights[token])
    if params.top_k:
        ranked = ranked[: params.top_k]
    total, kept, mass = sum(weights[token] for token in ranked), [], 0.0
    for token in ranked:
        kept.append(token)
        mass += weights[token] / total
        if mass >= params.top_p:
            break
    kept = [token for token in kept if weights[token] >= params.min_p * weights[ranked[0]]]
    result = np.zeros(VOCAB)
    for token in kept:
        result[token] = weights[token]
    return result / result.sum()


@pytest.mark.parametrize("name", PARAMETERS)
def test_draws_follow_the_distribution(name: str) -> None:
    params = SamplingParams(max_tokens=20, **PARAMETERS[name])
    expected = exact_distribution(params)
    token_ids, logprobs, sampling_logprobs = draw(params, NUM_DRAWS)
    counts = np.bincount(token_ids.numpy(), minlength=VOCAB)
    assert counts[expected == 0].sum() == 0, "a token outside the support was drawn"
    support = expected > 0
    assert chisquare(counts[support], expected[support] * NUM_DRAWS).pvalue > 1e-3
    drawn = expected[token_ids.numpy()]
    np.testing.assert_allclose(sampling_logprobs.numpy(), np.log(drawn), atol=2e-5)
    full = torch.log_softmax(LOGITS.double() / params.temperature, -1)
    np.testing.assert_allclose(logprobs.numpy(), full[token_ids].numpy(), atol=2e-5)


def test_the_chi_square_test_can_fail() -> None:
    expected = exact_distribution(SamplingParams(temperature=0.9))
    token_ids, _, _ = draw(SamplingParams(temperature=1.0), NUM_DRAWS)
    counts = np.bincount(token_ids.numpy(), minlength=VOCAB)
    assert chisquare(counts, expected * NUM_DRAWS).pvalue < 1e-3


def test_greedy_takes_the_argmax_after_penalties() -> None:
    best = int(LOGITS.argmax())
    token_ids, logprobs, sampling_logprobs = draw(SamplingParams(temperature=0.0), 3)
    assert token_ids.tolist() == [best] * 3
    assert sampling_logprobs.tolist() == [0.0] * 3
    assert logprobs[0].item() == pytest.approx(torch.log_softmax(LOGITS, -1)[best].item(), abs=1e-6)
    stop_logits = LOGITS.clone()
    stop_logits[4] = 50.0
    token_ids, _, _ = draw(SamplingParams(temperature=0.0, min_tokens=10), 1, logits=stop_logits)
    assert token_ids.tolist() == [best]


def test_rows_with_and_without_truncation_do_not_mix() -> None:
    mixed = [SamplingParams(), SamplingParams(top_k=1), SamplingParams(temperature=0.0), SamplingParams(min_p=0.3)]
    draws = tuple(Draw(sequences(params, 1, seed=i)[0], 0) for i, params in enumerate(mixed))
    inputs = sampling_inputs(draws, np.zeros(4, np.int64), 1, VOCAB, torch.device("cpu"))
    together = columns(sample(LOGITS[None, :], inputs))
    for i, params in enumerate(mixed):
        alone = draw(params, 1, seed=i)
        assert [column[i].item() for column in together] == [column[0].item() for column in alone]


def test_a_draw_depends_on_seed_index_and_position_only() -> None:
    seeds = np.array([0, 1, 7 << 32, 0, 0], np.uint64)
    indices = np.array([0, 0, 0, 1, 0], np.uint64)
    positions = np.array([5, 5, 5, 5, 6], np.uint64)
    together = uniforms(seeds, indices, positions)
    assert len(set(together.tolist())) == 5
    for i in range(5):
        assert uniforms(seeds[i : i + 1], indices[i : i + 1], positions[i : i + 1])[0] == together[i]


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniforms(np.arange(100_000, dtype=np.uint64), np.zeros(100_000, np.uint64), np.zeros(100_000, np.uint64))
    assert 0.0 <= numbers.min() < numbers.max() < 1.0
    assert chisquare(np.histogram(numbers, bins=100, range=(0, 1))[0]).pvalue > 1e-3


def test_p_values_over_many_blocks_are_uniform() -> None:
    size = 2_000
    zeros, at = np.zeros(size, np.uint64), np.full(size, 7, np.uint64)
    blocks = [np.arange(i * size, (i + 1) * size, dtype=np.uint64) for i in range(200)]
    p_values = [kstest(uniforms(block, zeros, at), "uniform").pvalue for block in blocks]
    assert kstest(p_values, "uniform").pvalue > 1e-3


def test_philox_gives_the_published_words() -> None:
    """Known answers of Random123's kat_vectors for philox4x32-10."""

    def words(*values: int) -> tuple[np.ndarray, ...]:
        return tuple(np.array([value], np.uint64) for value in values)

    def answer(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
        return [int(w[0]) for w in philox4x32(words(*key), words(*counter))]  # type: ignore[arg-type]

    assert answer((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert answer((ones, ones), (ones,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert answer((0xA4093822, 0x299F31D0), pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_extreme_logits_stay_finite() -> None:
    logits = torch.full((VOCAB,), -1e30)
    logits[5] = 1e30
    token_ids, logprobs, sampling_logprobs = draw(SamplingParams(), 100, logits=logits)
    assert token_ids.tolist() == [5] * 100
    assert logprobs.tolist() == sampling_logprobs.tolist() == [0.0] * 100
