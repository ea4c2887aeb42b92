"""Sampling options through `LLM` on a tiny model: most likely tokens, forbidden ones, processors, groups of 1,024."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rolloutd import LLM, SamplingParams
from rolloutd.engine.sequence import Request
from rolloutd.engine.token_rules import bad_word_ids
from rolloutd.errors import RequestError, RolloutdError, TokenOutOfRange
from rolloutd.outputs import FinishedCompletion, TopLogprobs

Factory = Callable[..., Path]

TOLERANCE = 2e-5
PROMPT = [5, 80, 33, 201, 7, 7, 140]


@pytest.fixture(scope="module")
def folder(tiny_model: Factory) -> Path:
    return tiny_model("qwen2", extra_eos=4)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), max_model_len=256, max_num_seqs=64, max_num_batched_tokens=64) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_leaks(llm: LLM) -> Iterator[None]:
    yield
    llm.engine.check_invariants()
    assert llm.stats().blocks_used == 0
    assert not llm.engine.has_unfinished()
    assert not llm.engine.take_failures()


def assert_top(found: TopLogprobs, expected_TV: torch.Tensor, k: int) -> None:
    """Assert the k most likely tokens of each row of log-probabilities; order is checked where no near-tie decides."""
    assert len(found) == len(expected_TV)
    for pairs, expected_V in zip(found, expected_TV, strict=True):
        top = expected_V.topk(k)
        assert len(pairs) == k
        assert max(abs(logprob - value) for (_, logprob), value in zip(pairs, top.values.tolist(), strict=True)) < 2e-5
        assert all(abs(logprob - expected_V[token].item()) < TOLERANCE for token, logprob in pairs)
        assert len({token for token, _ in pairs}) == k


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_top_logprobs_equal_transformers(llm: LLM, folder: Path, temperature: float) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = [(7 * i) % 500 for i in range(150)]  # longer than max_num_batched_tokens: several chunks
    params = SamplingParams(
        n=2, max_tokens=9, temperature=temperature, logprobs=5, prompt_logprobs=20, seed=1, ignore_eos=True, top_k=3
    )
    plain = SamplingParams(n=2, max_tokens=9, temperature=temperature, seed=1, ignore_eos=True, top_k=3)
    output, without = llm.generate([prompt, prompt], [params, plain])
    assert without.prompt_top_logprobs is None
    for completion, same in zip(output.outputs, without.outputs, strict=True):
        assert same.top_logprobs is None
        assert completion.token_ids == same.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion.token_ids]]), use_cache=False).logits[0]
        logp_TV = torch.log_softmax(logits / (temperature or 1.0), -1)
        assert completion.top_logprobs is not None
        assert_top(completion.top_logprobs, logp_TV[len(prompt) - 1 : -1], 5)
        for token, logprob, top in zip(completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True):
            assert dict(top).get(token, logprob) == logprob, "one number, twice"
        assert output.prompt_top_logprobs is not None
        assert output.prompt_top_logprobs[0] == []
        scored = TopLogprobs(20, output.prompt_top_logprobs.token_ids[20:], output.prompt_top_logprobs.logprobs[20:])
        assert_top(scored, logp_TV[: len(prompt) - 1], 20)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt)


def test_prompt_scores_survive_preemption(folder: Path) -> None:
    """A prompt that loses its blocks half-way is scored anew; what is recorded stays, what is missing is added."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=4, seed=1)
    prompt = [(11 * i) % 500 for i in range(100)]
    outputs = []
    for interrupt in (False, True):
        with LLM(str(folder), max_model_len=128, max_num_batched_tokens=32) as fresh:
            engine = fresh.engine
            engine.add_request(Request("r", tuple(prompt), params))
            done = engine.step() + engine.step()
            if interrupt:
                done += engine._scheduler.weights_changed("recompute")
            while engine.has_unfinished():
                done += engine.step()
            outputs.append(done)
    (whole,), (interrupted,) = outputs
    assert interrupted.prompt_top_logprobs == whole.prompt_top_logprobs
    assert interrupted.prompt_logprobs is not None
    assert whole.prompt_logprobs is not None
    assert interrupted.prompt_logprobs[1:] == whole.prompt_logprobs[1:]


def test_scores_alone_have_top_logprobs_too(llm: LLM) -> None:
    output = llm.generate(PROMPT, SamplingParams(max_tokens=0, prompt_logprobs=3))[0]
    assert output.prompt_top_logprobs is not None
    assert [len(top) for top in output.prompt_top_logprobs] == [0] + [3] * (len(PROMPT) - 1)


def test_only_allowed_tokens_come(llm: LLM) -> None:
    allowed = [10, 20, 30, 40]
    params = SamplingParams(n=4, max_tokens=20, allowed_token_ids=allowed, bad_token_ids=[20], seed=2)
    drawn = {token for completion in llm.generate(PROMPT, params)[0].outputs for token in completion.token_ids}
    assert drawn == {10, 30, 40}


def test_logprobs_are_the_models_whatever_is_forbidden(llm: LLM) -> None:
    """`logprobs` score a token under the whole distribution, `sampling_logprobs` under the one that it came from."""
    params = SamplingParams(
        max_tokens=12, allowed_token_ids=[10, 30, 40], logit_bias={30: 2.0}, seed=2, temperature=0.8
    )
    completion = llm.generate(PROMPT, params)[0].outputs[0]
    scores = llm.score([PROMPT], [completion.token_ids], temperature=0.8)[0]
    assert max(abs(a - b) for a, b in zip(completion.logprobs, scores, strict=True)) < TOLERANCE
    assert min(b - a for a, b in zip(completion.logprobs, completion.sampling_logprobs, strict=True)) > 0.5


def test_bias_of_100_decides(llm: LLM) -> None:
    completion = llm.generate(PROMPT, SamplingParams(max_tokens=5, logit_bias={77: 100.0}, seed=3))[0].outputs[0]
    assert completion.token_ids == [77] * 5


def test_bad_words_are_not_spelt(llm: LLM) -> None:
    """Half of the two-token words that came become bad words; none of those comes again, others still do."""
    options: dict[str, Any] = {"n": 4, "max_tokens": 40, "seed": 5, "allowed_token_ids": list(range(64, 70))}

    def pairs(params: SamplingParams) -> set[tuple[int, ...]]:
        outputs = llm.generate(PROMPT, params)[0].outputs
        return {pair for c in outputs for pair in zip(c.token_ids, c.token_ids[1:], strict=False)}

    words = {pair: llm.engine.tokenizer.decode(pair) for pair in sorted(pairs(SamplingParams(**options)))}
    spelt = [pair for pair, word in words.items() if word_tokens(llm, word) == list(pair)]
    assert len(spelt) >= 6
    bad, others = spelt[::2], spelt[1::2]
    seen = pairs(SamplingParams(**options, bad_words=tuple(words[pair] for pair in bad)))
    assert not seen & set(bad)
    assert seen & set(others)


def test_a_bad_word_is_forbidden_with_and_without_a_space_before_it() -> None:
    table = {"ab": [1, 2], " ab": [9], "cd": [3, 4], " cd": [8, 3, 4], "e": [5], " e": [6]}
    words = bad_word_ids(["ab", " cd", "e"], table.__getitem__, 10)
    assert words == ((1, 2), (9,), (3, 4), (5,), (6,))
    with pytest.raises(TokenOutOfRange, match="bad_words 'ab': token id 9 is outside the vocabulary, 0 to 8"):
        bad_word_ids(["ab"], table.__getitem__, 9)


def word_tokens(llm: LLM, word: str) -> list[int]:
    return list(llm.engine.tokenizer.encode(word, add_special_tokens=False))


BAD: list[tuple[dict[str, Any], type[RolloutdError], str]] = [
    ({"logit_bias": {512: 1.0}}, TokenOutOfRange, "logit_bias: token id 512 is outside the vocabulary, 0 to 511"),
    ({"allowed_token_ids": [3, 600]}, TokenOutOfRange, "allowed_token_ids: token id 600"),
    ({"bad_token_ids": [1 << 30]}, TokenOutOfRange, f"bad_token_ids: token id {1 << 30}"),
    ({"bad_token_ids": list(range(512))}, RequestError, "forbid all of the vocabulary"),
    (
        {"allowed_token_ids": [255, 254], "min_tokens": 1},
        RequestError,
        "min_tokens=1 .*allowed_token_ids holds no other",
    ),
    ({"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 2}, RequestError, "min_tokens=2"),
    (
        {"allowed_token_ids": [3, 9], "bad_token_ids": [9], "stop_token_ids": [3], "min_tokens": 2},
        RequestError,
        "min_tok",
    ),
]


@pytest.mark.parametrize(("params", "error", "words"), BAD)
def test_what_cannot_be_drawn_is_refused_at_admission(
    llm: LLM, params: dict[str, Any], error: type[RolloutdError], words: str
) -> None:
    steps = llm.stats().num_steps
    with pytest.raises(error, match=words):
        llm.generate([PROMPT, PROMPT], SamplingParams(**params))
    assert llm.stats().num_steps == steps


def test_only_stop_tokens_allowed_ends_at_once_and_longer_than_min_tokens_needs_another(llm: LLM) -> None:
    only = SamplingParams(allowed_token_ids=[255, 254], max_tokens=5, seed=1)
    assert len(llm.generate(PROMPT, only)[0].outputs[0].token_ids) == 1
    one_more = SamplingParams(allowed_token_ids=[3, 254], min_tokens=3, max_tokens=50, seed=1, logit_bias={254: 100.0})
    assert llm.generate(PROMPT, one_more)[0].outputs[0].token_ids == [3, 3, 3, 254]
    ignoring = SamplingParams(allowed_token_ids=[255, 254], min_tokens=3, max_tokens=3, ignore_eos=True)
    assert len(llm.generate(PROMPT, ignoring)[0].outputs[0].token_ids) == 3


def test_bad_words_that_leave_no_token_are_refused(llm: LLM) -> None:
    (token,) = word_tokens(llm, "q")
    with pytest.raises(RequestError, match="bad_words forbid all of allowed_token_ids"):
        llm.generate(PROMPT, SamplingParams(allowed_token_ids=[token], bad_words=["q"]))


def test_a_dead_end_on_the_way_fails_the_request_by_name(llm: LLM) -> None:
    """After `q` neither `q` nor `z` may come, and nothing else is allowed."""
    tokens = word_tokens(llm, "qz")
    assert len(tokens) == 2, "two tokens, or the word would be forbidden at once"
    params = SamplingParams(allowed_token_ids=(tokens[0], tokens[1]), bad_words=("qz", "qq"), max_tokens=5, seed=1)
    bias = {tokens[0]: 100.0}
    with pytest.raises(RequestError, match="no token left to draw after 1 tokens"):
        llm.generate(
            [[1, 2], PROMPT], [SamplingParams(), SamplingParams.from_dict({**params.to_dict(), "logit_bias": bias})]
        )
    assert llm.generate(PROMPT, SamplingParams(max_tokens=2))[0].outputs[0].token_ids


def test_a_processor_sees_the_output_and_decides(llm: LLM) -> None:
    seen: list[list[int]] = []

    def count_up(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(list(output))
        output.append(-1)  # its own list
        assert logits.dtype == torch.float32
        assert logits.shape == (512,)
        return torch.zeros_like(logits).index_fill(0, torch.tensor(100 + len(seen)), 200.0)

    params = SamplingParams(max_tokens=4, logits_processors=(count_up,))
    completion = llm.generate(PROMPT, params)[0].outputs[0]
    assert completion.token_ids == [101, 102, 103, 104]
    assert seen == [[], [101], [101, 102], [101, 102, 103]]
    assert max(completion.sampling_logprobs) > -1e-6 > max(completion.logprobs)


def test_a_processor_that_fails_ends_its_request_and_no_other(llm: LLM) -> None:
    def fails_late(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 3:
            raise ZeroDivisionError("at three")
        return logits

    good = SamplingParams(n=3, max_tokens=12, seed=4, logprobs=2)
    bad = SamplingParams(n=4, max_tokens=12, seed=4, logits_processors=(fails_late,), ignore_eos=True)
    alone = llm.generate(PROMPT, good)[0]
    engine = llm.engine
    engine.add_request(Request("bad", tuple(PROMPT), bad))
    engine.add_request(Request("good", tuple(PROMPT), good))
    done: list[FinishedCompletion] = []
    failures: dict[str, RolloutdError] = {}
    while engine.has_unfinished():
        done += engine.step()
        failures.update(engine.take_failures())
    assert list(failures) == ["bad"]
    assert isinstance(failures["bad"], RequestError)
    assert "logits_processors[0] (fails_late) of request 'bad', after 3 tokens, raised" in failures["bad"].message
    assert isinstance(failures["bad"].__cause__, ZeroDivisionError), "the caller's traceback is not lost"
    assert {one.request_id for one in done} == {"good"}
    outputs = sorted((one.completion for one in done), key=lambda completion: completion.index)
    assert [c.token_ids for c in outputs] == [c.token_ids for c in alone.outputs]
    with pytest.raises(RequestError, match="fails_late"):
        llm.generate([PROMPT, PROMPT], [good, bad])
    assert [c.token_ids for c in llm.generate(PROMPT, good)[0].outputs] == [c.token_ids for c in alone.outputs]


def test_a_request_that_fails_with_its_last_token_delivers_nothing(llm: LLM) -> None:
    """Some samples would end in the very step in which another fails."""

    def fails_once(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return logits if len(calls) < 3 else logits[:1]

    calls: list[int] = []
    params = SamplingParams(n=3, max_tokens=1, logits_processors=(fails_once,))
    llm.engine.add_request(Request("bad", tuple(PROMPT), params))
    assert llm.engine.step() == []
    assert list(llm.engine.take_failures()) == ["bad"]
    assert not llm.engine.has_unfinished()


def test_a_group_of_1024_is_seated_in_turns(llm: LLM) -> None:
    params = SamplingParams(n=1024, max_tokens=2, min_tokens=2, seed=6)
    output = llm.generate(PROMPT, params)[0]
    assert [c.index for c in output.outputs] == list(range(1024))
    assert {len(c.token_ids) for c in output.outputs} == {2}
    few = llm.generate(PROMPT, SamplingParams(n=8, max_tokens=2, min_tokens=2, seed=6))[0]
    assert [c.token_ids for c in few.outputs] == [c.token_ids for c in output.outputs[:8]]
    assert len({tuple(c.token_ids) for c in output.outputs}) > 500
