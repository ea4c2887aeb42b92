"""Bias, allowed and forbidden tokens and processors against exact distributions; failures stay with their row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rolloutd.engine.sequence import Draw, Group, Request, Sequence
from rolloutd.engine.token_rules import token_rules
from rolloutd.runtime.sampler import Samples, sample, sampling_inputs, top_logprobs
from rolloutd.sampling_params import LogitsProcessor, SamplingParams

VOCAB = 24
NUM_DRAWS = 20_000
PROMPT = (3, 3, 5)
OUTPUT = [7, 7, 7, 2]
STOP_IDS = frozenset({1, 4})
WORDS = ((9,), (7, 2, 6), (2, 11), (7, 12), (7, 2), (7, 7, 7, 7, 2, 13), (3, 5, 14))
"""After the output 7 7 7 2: 9, 6 and 11 are forbidden. The last two reach beyond it, or into the prompt."""
FORBIDDEN_BY_WORDS = {9, 6, 11}

LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 1.5


def halve_after_two(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    assert output == OUTPUT
    return logits / 2


def boost_in_place(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[output[-1]] += 3.0
    return logits


BIAS = {0: 2.5, 7: -1.25, 23: 100.0, 8: -100.0, 2: 1.0}

OPTIONS: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {k: v for k, v in BIAS.items() if k != 23}},
    "overwhelming bias": {"logit_bias": BIAS, "temperature": 50.0},
    "allowed": {"allowed_token_ids": [1, 2, 5, 17, 23]},
    "bad": {"bad_token_ids": [0, 1, 2, 22]},
    "allowed and bad": {"allowed_token_ids": [0, 1, 2, 3, 4, 5], "bad_token_ids": [0, 5, 20]},
    "bad_words": {"bad_words": ["spelt in WORDS"]},
    "processors": {"logits_processors": [halve_after_two, boost_in_place]},
    "together": {
        "logit_bias": {2: 4.0, 7: 1.0, 1: 8.0, 19: 5.0},
        "allowed_token_ids": [1, 2, 3, 5, 6, 7, 9, 17, 19, 23],
        "bad_token_ids": [19],
        "bad_words": ["spelt in WORDS"],
        "logits_processors": [boost_in_place, halve_after_two],
        "min_tokens": 9,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
        "temperature": 0.8,
        "top_p": 0.97,
    },
}


def sequence_of(params: SamplingParams, seed: int) -> Sequence:
    rules = token_rules(params, WORDS if params.bad_words else ())
    group = Group.from_request(Request(str(seed), PROMPT, params), seed=seed, eos_token_ids=STOP_IDS, rules=rules)
    sequence = group.spawn()
    sequence.token_ids += OUTPUT
    return sequence


def draw(many: list[SamplingParams], *, first_seed: int = 1_000_000, logits: torch.Tensor = LOGITS) -> Samples:
    draws = tuple(Draw(sequence_of(params, first_seed + i), 0) for i, params in enumerate(many))
    inputs = sampling_inputs(draws, np.zeros(len(many), np.int64), 1, VOCAB, torch.device("cpu"))
    return sample(logits[None, :], inputs)


def exact_distribution(params: SamplingParams) -> np.ndarray:
    """Return the sampling distribution, written out one token at a time in float64."""
    logits = [float(x) for x in LOGITS.double()]
    for token in {*PROMPT, *OUTPUT}:
        logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
    for token in set(OUTPUT):
        logits[token] -= params.presence_penalty + params.frequency_penalty * OUTPUT.count(token)
    for token, amount in (params.logit_bias or {}).items():
        logits[token] += amount
    for processor in params.logits_processors:
        logits = processor(list(OUTPUT), torch.tensor(logits, dtype=torch.float64)).tolist()
    for token in range(VOCAB):
        if (
            (params.allowed_token_ids is not None and token not in params.allowed_token_ids)
            or token in params.bad_token_ids
            or (params.bad_words and token in FORBIDDEN_BY_WORDS)
            or (len(OUTPUT) < params.min_tokens and token in STOP_IDS)
        ):
            logits[token] = -math.inf
    weights = np.exp((np.array(logits) - max(logits)) / params.temperature)
    ranked = sorted(range(VOCAB), key=lambda token: -weights[token])
    before = np.cumsum([0.0, *weights[ranked]])[:-1]
    result = np.zeros(VOCAB)
    for token, mass in zip(ranked, before, strict=True):
        result[token] = weights[token] if mass < params.top_p * weights.sum() else 0.0
    return result / result.sum()


@pytest.mark.parametrize("name", OPTIONS)
def test_draws_follow_the_distribution(name: str) -> None:
    params = SamplingParams(max_tokens=20, **OPTIONS[name])
    expected = exact_distribution(params)
    samples = draw([params] * (NUM_DRAWS if not params.logits_processors else 3_000))
    assert not samples.failures
    tokens = samples.token_R.numpy()
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0, "a token outside the support was drawn"
    support = expected > 0
    if support.sum() > 1:
        assert chisquare(counts[support], expected[support] * len(tokens)).pvalue > 1e-3
    np.testing.assert_allclose(samples.sampling_logprob_R.numpy(), np.log(expected[tokens]), atol=2e-5)
    full = torch.log_softmax(LOGITS.double() / params.temperature, -1)
    np.testing.assert_allclose(samples.logprob_R.numpy(), full[tokens].numpy(), atol=2e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_takes_the_best_of_what_is_left(name: str) -> None:
    options = {k: v for k, v in OPTIONS[name].items() if k not in ("temperature", "top_p")}
    expected = exact_distribution(SamplingParams(max_tokens=20, **options))
    samples = draw([SamplingParams(max_tokens=20, **{**options, "temperature": 0.0})])
    assert samples.token_R.tolist() == [int(expected.argmax())]
    assert samples.sampling_logprob_R.tolist() == [0.0]


def test_rows_of_different_requests_do_not_mix() -> None:
    many = [SamplingParams(), *(SamplingParams(max_tokens=20, **options) for options in OPTIONS.values())]
    many += [SamplingParams(top_k=3), SamplingParams(max_tokens=20, **OPTIONS["allowed"], logprobs=3)]
    logits = LOGITS.clone()
    together = draw(many, logits=logits)
    assert torch.equal(logits, LOGITS), "the model's logits were written to"
    for i, params in enumerate(many):
        alone = draw([params], first_seed=1_000_000 + i)
        for name in ("token_R", "logprob_R", "sampling_logprob_R"):
            assert getattr(together, name)[i].item() == getattr(alone, name)[0].item()
    assert list(together.top) == [len(many) - 1]


def test_equal_options_share_their_rules_and_no_options_have_none() -> None:
    one, two = SamplingParams(logit_bias={3: 1.0}, seed=1), SamplingParams(logit_bias={3: 1.0}, seed=2)
    assert token_rules(one, ()) is token_rules(two, ())
    assert token_rules(one, ()) is not token_rules(one, ((1, 2),))
    assert token_rules(SamplingParams(stop="a", min_tokens=2, top_k=3), ()) is None


def returns(value: Any) -> LogitsProcessor:
    def processor(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = value(logits) if callable(value) else value
        return result

    return processor


def write_nan(logits: torch.Tensor) -> torch.Tensor:
    logits[3] = float("nan")
    return logits


def fail(logits: torch.Tensor) -> torch.Tensor:
    raise KeyError("my own fault")


FAULTS: dict[str, tuple[Any, str]] = {
    "raises": (fail, r"raised KeyError: 'my own fault'"),
    "None": (lambda logits: None, "returned a NoneType"),
    "a list": (lambda logits: logits.tolist(), "returned a list"),
    "shape": (lambda logits: logits[:-1], r"returned torch.float32 \[23\] on cpu, not torch.float32 \[24\]"),
    "batch": (lambda logits: logits[None], r"\[1, 24\]"),
    "dtype": (lambda logits: logits.double(), "returned torch.float64"),
    "NaN": (write_nan, "returned NaN"),
    "+inf": (lambda logits: logits.index_fill(0, torch.tensor([2]), float("inf")), r"returned \+inf"),
    "all -inf": (lambda logits: torch.full_like(logits, -float("inf")), "returned -inf for every token"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_processor_that_fails_fails_its_own_row(name: str) -> None:
    value, words = FAULTS[name]
    good = SamplingParams(max_tokens=20, **OPTIONS["together"])
    bad = SamplingParams(max_tokens=20, logits_processors=(boost_in_place, returns(value)))
    samples = draw([good, bad, SamplingParams()])
    assert list(samples.failures) == [1]
    error = samples.failures[1]
    assert error.code == "INVALID_REQUEST"
    with pytest.raises(type(error), match=rf"logits_processors\[1\] \(processor\) of request '1000001'.*{words}"):
        raise error
    for row, params in ((0, good), (2, SamplingParams())):
        alone = draw([params], first_seed=1_000_000 + row)
        assert samples.token_R[row].item() == alone.token_R[0].item()
        assert samples.sampling_logprob_R[row].item() == alone.sampling_logprob_R[0].item()


def test_a_row_with_no_token_left_fails_alone_and_by_name() -> None:
    dead_end = SamplingParams(max_tokens=20, allowed_token_ids=[6, 9, 11], bad_words=["spelt in WORDS"])
    samples = draw([SamplingParams(), dead_end])
    assert list(samples.failures) == [1]
    assert "no token left to draw after 4 tokens" in samples.failures[1].message
    assert samples.token_R[0].item() == draw([SamplingParams()]).token_R[0].item()


def test_what_is_forbidden_stays_so_whatever_a_processor_returns() -> None:
    params = SamplingParams(
        max_tokens=20,
        bad_token_ids=[5],
        allowed_token_ids=[1, 5, 6],
        min_tokens=9,
        logits_processors=(returns(lambda logits: torch.zeros_like(logits).index_fill(0, torch.tensor([5, 1]), 50.0)),),
    )
    assert draw([params] * 50).token_R.tolist() == [6] * 50


def test_a_processor_may_keep_what_it_saw() -> None:
    kept: list[torch.Tensor] = []

    def keep(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        kept.append(logits)
        return logits

    draw([SamplingParams(bad_token_ids=(5,), logit_bias={6: 1.5}, logits_processors=(keep,))])
    assert torch.equal(kept[0], LOGITS.index_add(0, torch.tensor([6]), torch.tensor([1.5])))


@pytest.mark.parametrize("k", [2, 5, 20])
def test_top_logprobs_are_those_of_the_full_distribution(k: int) -> None:
    params = SamplingParams(temperature=0.7, logprobs=k, top_k=1, bad_token_ids=[int(LOGITS.argmax())])
    samples = draw([SamplingParams(), params, SamplingParams(temperature=0.0, logprobs=3)])
    expected = torch.log_softmax(LOGITS.double() / 0.7, -1).topk(k)
    (found,) = samples.top[1]
    assert [token for token, _ in found] == expected.indices.tolist()
    np.testing.assert_allclose([logprob for _, logprob in found], expected.values.numpy(), atol=2e-5)
    assert len(samples.top[2][0]) == 3
    assert sorted(samples.top) == [1, 2]


def test_equal_top_logprobs_come_in_the_order_of_ids_and_a_small_vocabulary_ends_the_list() -> None:
    top = top_logprobs(torch.tensor([[0.5, 1.0, 0.5, 1.0], [0.0, 0.0, 0.0, -1.0]]), 6)
    assert len(top) == 2
    assert top[0] == [(1, 1.0), (3, 1.0), (0, 0.5), (2, 0.5)]
    assert top[-1] == [(0, 0.0), (1, 0.0), (2, 0.0), (3, -1.0)]
    assert top[:] == list(top)
    with pytest.raises(IndexError):
        top[2]
