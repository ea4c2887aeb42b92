"""SamplingParams: whatever comes in, either it is valid to the last field, or the error names the field."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rolloutd import SamplingParams
from rolloutd.errors import RequestError
from rolloutd.sampling_params import (
    MAX_BAD_WORDS,
    MAX_LISTED_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_LOGITS_PROCESSORS,
    MAX_N,
    MAX_STOP_STRING_LEN,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
)

FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]
INTEGERS = ["n", "top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs"]
NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert params.stop == ()
    assert params.stop_token_ids == ()
    assert params.seed is None
    assert not params.truncates
    assert not params.penalises


def test_it_is_frozen_keyword_only_and_hashable() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[3])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(4)  # type: ignore[misc]
    assert hash(params) == hash(SamplingParams(stop=("a",), stop_token_ids=(3,)))


@pytest.mark.parametrize(
    ("given_stop", "kept"), [(None, ()), ("ab", ("ab",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ())]
)
def test_stop_takes_one_or_many(given_stop: Any, kept: tuple[str, ...]) -> None:
    assert SamplingParams(stop=given_stop).stop == kept


@pytest.mark.parametrize(("given_ids", "kept"), [(None, ()), (7, (7,)), ([7, 8], (7, 8)), ({7}, (7,)), (0, (0,))])
def test_stop_token_ids_take_one_or_many(given_ids: Any, kept: tuple[int, ...]) -> None:
    assert SamplingParams(stop_token_ids=given_ids).stop_token_ids == kept


def test_token_options_have_one_form() -> None:
    """Whatever order and type they come in: equal requests are equal, hash alike and travel as one."""
    one = SamplingParams(logit_bias={7: 1, 3: -2.5}, allowed_token_ids=[9, 4, 9], bad_token_ids={8}, bad_words="a")
    two = SamplingParams(
        logit_bias={"3": -2.5, "7": 1.0},  # type: ignore[dict-item]
        allowed_token_ids=(4, 9),
        bad_token_ids=(8,),
        bad_words=["a"],  # type: ignore[arg-type]
    )
    assert one == two
    assert hash(one) == hash(two)
    assert one.logit_bias == {3: -2.5, 7: 1.0}
    assert (one.allowed_token_ids, one.bad_token_ids) == ((4, 9), (8,))
    assert SamplingParams(logit_bias={}) == SamplingParams()
    bias = {5: 1.0}
    kept = SamplingParams(logit_bias=bias)
    bias[6] = 1.0
    assert kept.logit_bias == {5: 1.0}


def test_only_what_differs_from_the_defaults_travels() -> None:
    assert SamplingParams().to_dict() == {}
    assert SamplingParams(n=4, stop="x").to_dict() == {"n": 4, "stop": ["x"]}


def test_processors_stay_in_the_process() -> None:
    def twice(output: list[int], logits: Any) -> Any:
        return logits * 2

    params = SamplingParams(logits_processors=twice)  # type: ignore[arg-type]
    assert params.logits_processors == (twice,)
    assert hash(params) == hash(SamplingParams(logits_processors=(twice,)))
    with pytest.raises(RequestError, match=r"logits_processors are functions.*Use LLM"):
        params.to_dict()
    with pytest.raises(RequestError, match="logits_processors holds 'twice'"):
        SamplingParams.from_dict({"logits_processors": ["twice"]})


def test_both_ways_to_switch_top_k_off_are_one() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    with pytest.raises(RequestError, match="top_k=-2"):
        SamplingParams(top_k=-2)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", ["1", 1.0, True, [1], float("nan"), b"1"])
def test_an_integer_must_be_one(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^INVALID_REQUEST: {name}="):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["1", None, True, [1.0], float("nan"), float("inf"), -float("inf"), 1e9, -1e9])
def test_a_number_must_be_finite_and_in_range(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^INVALID_REQUEST: {name}="):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": MAX_N + 1}, "n"),
        ({"n": 1 << 80}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e-5}, "temperature"),
        ({"temperature": 5e-324}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.0000001}, "top_p"),
        ({"min_p": -1e-9}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "prompt_logprobs": 1}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": -(1 << 63) - 1}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1 << 31: 1.0}}, "logit_bias"),
        ({"logit_bias": {True: 1.0}}, "logit_bias"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1.0}}, "logit_bias"),
        ({"logit_bias": {1.0: 1.0}}, "logit_bias"),
        ({"logit_bias": {5: 100.5}}, r"logit_bias\[5"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias\[5"),
        ({"logit_bias": {5: -float("inf")}}, r"logit_bias\[5"),
        ({"logit_bias": {5: "1"}}, r"logit_bias\[5"),
        ({"logit_bias": {5: None}}, r"logit_bias\[5"),
        ({"logit_bias": [(5, 1.0)]}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": ["1"]}, "allowed_token_ids"),
        ({"allowed_token_ids": {5: 1.0}}, "allowed_token_ids"),
        ({"allowed_token_ids": range(3)}, "allowed_token_ids"),
        ({"allowed_token_ids": list(range(MAX_LISTED_TOKENS + 1))}, "allowed_token_ids"),
        ({"allowed_token_ids": [4, 5], "bad_token_ids": [5, 4, 6]}, "allowed_token_ids"),
        ({"bad_token_ids": [1 << 31]}, "bad_token_ids"),
        ({"bad_token_ids": [1.0]}, "bad_token_ids"),
        ({"bad_token_ids": list(range(MAX_LISTED_TOKENS + 1))}, "bad_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["a", " \t"]}, "bad_words"),
        ({"bad_words": [3]}, "bad_words"),
        ({"bad_words": "x" * (MAX_STOP_STRING_LEN + 1)}, "bad_words"),
        ({"bad_words": ["x"] * (MAX_BAD_WORDS + 1)}, "bad_words"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
        ({"logits_processors": [1]}, "logits_processors"),
        ({"logits_processors": "abc"}, "logits_processors"),
        ({"logits_processors": [print] * (MAX_LOGITS_PROCESSORS + 1)}, "logits_processors"),
        ({"beam_width": 2, "logprobs": 2}, "logprobs"),
        ({"beam_width": 2, "logit_bias": {1: 1.0}}, "logit_bias"),
        ({"beam_width": 2, "allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"beam_width": 2, "bad_words": ["a"]}, "bad_words"),
        ({"beam_width": 2, "logits_processors": [print]}, "logits_processors"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"ignore_eos": None}, "ignore_eos"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * (MAX_STOP_STRING_LEN + 1)}, "stop"),
        ({"stop": ["x"] * (MAX_STOP_STRINGS + 1)}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1 << 31]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"stop_token_ids": "7"}, "stop_token_ids"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(MAX_STOP_STRINGS + 1))}, "stop_token_ids"),
    ],
)
def test_the_error_names_the_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match=rf"INVALID_REQUEST: .*\b{field}\b"):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"n": MAX_N},
        {"temperature": 0},
        {"temperature": 1e-4},
        {"temperature": 100},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"max_tokens": 0, "prompt_logprobs": 0},
        {"min_tokens": 16},
        {"seed": (1 << 64) - 1},
        {"seed": -(1 << 63)},
        {"logprobs": 0},
        {"logprobs": MAX_TOP_LOGPROBS, "prompt_logprobs": MAX_TOP_LOGPROBS},
        {"beam_width": 2, "logprobs": 1},
        {"logit_bias": {0: -100, (1 << 31) - 1: 100}},
        {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)},
        {"allowed_token_ids": list(range(MAX_LISTED_TOKENS))},
        {"allowed_token_ids": [4, 5], "bad_token_ids": [5]},
        {"bad_words": ["x" * MAX_STOP_STRING_LEN] * MAX_BAD_WORDS},
        {"stop": "a", "include_stop_str_in_output": True},
        {"stop": "x" * MAX_STOP_STRING_LEN},
        {"stop_token_ids": [0, (1 << 31) - 1]},
    ],
)
def test_the_edges_are_valid(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params


@pytest.mark.parametrize("values", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_truncation_is_known(values: dict[str, Any]) -> None:
    assert SamplingParams(**values).truncates
    assert not SamplingParams(**values).penalises


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_are_known(name: str) -> None:
    assert SamplingParams(**{name: 1.5}).penalises
    assert not SamplingParams(**{name: 1.5}).truncates


def test_an_unknown_name_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(RequestError, match=r"unknown sampling parameter 'temprature'. Did you mean 'temperature'\?"):
        SamplingParams.from_dict({"temprature": 1.0})
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 20),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 9), st.text(max_size=3), st.booleans()), max_size=4),
    st.dictionaries(st.one_of(st.integers(-1, 9), st.text("0123x", max_size=3)), st.floats(-150, 150), max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4))
def test_whatever_comes_is_valid_or_refused(values: dict[str, Any]) -> None:
    refusal = ""
    try:
        params = SamplingParams.from_dict(values)
    except RequestError as error:
        refusal = error.message
    if refusal:
        assert any(name in refusal for name in values)
        return
    assert 1 <= params.n <= MAX_N
    assert params.min_tokens <= params.max_tokens
    assert params.max_tokens >= 1 or params.prompt_logprobs is not None
    assert all(math.isfinite(getattr(params, name)) for name in NUMBERS)
    assert all(isinstance(text, str) and text for text in params.stop)
    assert SamplingParams.from_dict(params.to_dict()) == params
