"""Sampling options over the wire: a daemon with a real tiny model answers what `LLM` answers, to the last number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rolloutd import LLM, RequestOutput, RolloutClient, SamplingParams
from rolloutd.engine.sequence import Request
from rolloutd.errors import RequestError, RolloutdError, TokenOutOfRange
from rolloutd.serve import protocol as wire
from rolloutd.serve.arrays import Finished, join_finished, pack_finished, split_finished
from rolloutd.serve.spawn import start_daemon
from tests.tiny_models import build_tokenizer

Factory = Callable[..., Path]

PROMPT = [5, 80, 33, 201, 7, 7, 140]
TOKENIZER = build_tokenizer(512)
LETTERS: list[int] = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
OPTIONS = {"max_num_seqs": 8, "max_model_len": 128}

REQUESTS: list[dict[str, Any]] = [
    {},
    {"logprobs": 1, "prompt_logprobs": 1},
    {"logprobs": 4, "n": 3},
    {"prompt_logprobs": 7},
    {"logprobs": 20, "prompt_logprobs": 20, "temperature": 0.0},
    {"logprobs": 2, "max_tokens": 0, "prompt_logprobs": 2},
    {"logit_bias": {k: (k % 7) - 3.25 for k in range(400)}},
    {"allowed_token_ids": list(range(0, 500, 3)), "bad_token_ids": [0, 3, 6], "n": 2},
    {"bad_words": ["e", "th", " a"], "allowed_token_ids": list(range(64, 90)), "max_tokens": 30},
    {"allowed_token_ids": LETTERS, "stop": ["e", "t", "a"], "include_stop_str_in_output": True, "max_tokens": 100},
    {"allowed_token_ids": [10, 20], "stop_token_ids": [20], "min_tokens": 3},
    {"beam_width": 3, "n": 2},
]


@pytest.fixture(scope="module")
def folder(tiny_model: Factory) -> str:
    return str(tiny_model("qwen2", tie=True))


@pytest.fixture(scope="module")
def real(folder: str, own_run_dir: Path) -> Iterator[RolloutClient]:
    with start_daemon({"model": folder, **OPTIONS}) as daemon, RolloutClient(daemon.address) as client:
        yield client


def comparable(output: RequestOutput) -> dict[str, Any]:
    """Return an answer without its request id; NaN, the first prompt score, as None."""
    values = dataclasses.asdict(dataclasses.replace(output, request_id=""))
    scores = values["prompt_logprobs"]
    if scores is not None:
        assert scores[0] != scores[0]
        scores[0] = None
    return values


def test_a_daemon_answers_what_an_llm_answers(real: RolloutClient, folder: str) -> None:
    params = [SamplingParams(**{"max_tokens": 12, "seed": i, **options}) for i, options in enumerate(REQUESTS)]
    remote = real.generate([PROMPT] * len(params), params)
    with LLM(folder, **OPTIONS) as llm:
        local = llm.generate([PROMPT] * len(params), params)
    for here, there, options in zip(local, remote, REQUESTS, strict=True):
        assert comparable(there) == comparable(here), options
        assert (there.outputs[0].top_logprobs is not None) == (options.get("logprobs", 0) > 1)
        assert (there.prompt_top_logprobs is not None) == (options.get("prompt_logprobs", 0) > 1)
    top = remote[2].outputs[1].top_logprobs
    assert top is not None
    assert [len(pairs) for pairs in top] == [4] * 12
    assert remote[9].outputs[0].text[-1] in "eta"
    assert remote[11].outputs[0].beam_score is not None


def test_completions_with_and_without_top_logprobs_share_a_message(folder: str) -> None:
    params = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=2, logprobs=3, prompt_logprobs=2)]
    with LLM(folder, **OPTIONS) as llm:
        for i, one in enumerate([params[0], params[1], params[0]]):
            llm.engine.add_request(Request(str(i), tuple(PROMPT), one))
        done = []
        while llm.engine.has_unfinished():
            done += llm.engine.step()
    packed = [pack_finished(one, []) for one in done]

    def travel(finished: list[Finished]) -> tuple[list[Finished], int]:
        items, columns = join_finished(finished)
        message, frames = wire.decode(wire.encode(wire.Completions(items=items), columns))
        assert isinstance(message, wire.Completions)
        return list(split_finished(message.items, frames)), len(frames)

    arrived, num_frames = travel(packed)
    assert num_frames == 10
    assert [one.output() for one in arrived] == [one.completion for one in done]
    assert [one.prompt_top_logprobs() for one in arrived] == [one.prompt_top_logprobs for one in done]
    plain = [one for one in packed if not one.item.num_top]
    arrived, num_frames = travel(plain)
    assert num_frames == 6, "what nobody asked for costs no frame"
    assert b"num_top" not in bytes(wire.encode(wire.Completions(items=[plain[0].item]))[0])


BAD: list[tuple[dict[str, Any], type[RolloutdError], str]] = [
    ({"logit_bias": {512: 1.0}}, TokenOutOfRange, "logit_bias: token id 512"),
    ({"allowed_token_ids": [1, 512]}, TokenOutOfRange, "allowed_token_ids: token id 512"),
    ({"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 2}, RequestError, "min_tokens=2 forbids"),
    ({"allowed_token_ids": LETTERS[:1], "bad_words": ["a"]}, RequestError, "bad_words forbid all"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_what_cannot_be_drawn_is_refused_by_name(
    real: RolloutClient, options: dict[str, Any], error: type[RolloutdError], words: str
) -> None:
    with pytest.raises(error, match=words):
        real.generate([PROMPT], SamplingParams(**options))


def test_a_dead_end_fails_its_request_and_no_other(real: RolloutClient) -> None:
    """After `q` only `z` is allowed, and the two would spell a bad word."""
    good = [SamplingParams(max_tokens=60, seed=i, ignore_eos=True) for i in range(3)]
    alone = [output.outputs[0].token_ids for output in real.generate([PROMPT] * 3, good)]
    q, z = TOKENIZER.encode("qz")
    dead_end = SamplingParams(
        allowed_token_ids=(q, z), bad_words=("qz", "qq"), logit_bias={q: 100.0}, max_tokens=9, n=2, seed=1
    )
    among = iter(real.stream([PROMPT] * 3, [*good[:2], SamplingParams(max_tokens=1)]))
    assert next(among)[0] == 2, "the others run"
    with pytest.raises(RequestError, match="no token left to draw after 1 tokens"):
        real.generate([PROMPT], dead_end)
    assert {index: completion.token_ids for index, completion in among} == dict(enumerate(alone[:2]))
    assert real.stats().num_running == 0


def test_processors_do_not_travel(real: RolloutClient) -> None:
    with pytest.raises(RequestError, match=r"logits_processors are functions.*Use LLM"):
        real.generate([PROMPT], SamplingParams(logits_processors=(lambda ids, logits: logits,)))
    assert real.generate([PROMPT], SamplingParams(max_tokens=1))[0].outputs
