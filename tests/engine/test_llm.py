"""`LLM` end to end on tiny models: bad input, seeds, stops, work counts, prefix reuse."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rolloutd import LLM, SamplingParams
from rolloutd.errors import (
    ConfigError,
    MaxModelLen,
    ModelNotFound,
    RequestError,
    RequestExceedsKvPool,
    RolloutdError,
    TokenOutOfRange,
)

Factory = Callable[..., Path]


@pytest.fixture(scope="module")
def llm(tiny_model: Factory) -> Iterator[LLM]:
    with LLM(str(tiny_model("qwen2", extra_eos=4)), max_model_len=256) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_leaks(llm: LLM) -> Iterator[None]:
    yield
    llm.engine.check_invariants()
    assert llm.stats().blocks_used == 0
    assert not llm.engine.has_unfinished()


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for _ in range(count)]


def test_a_seeded_request_gives_the_same_tokens_alone_and_among_17_others(llm: LLM) -> None:
    prompt = random_prompts(1, 21, seed=9)[0]
    params = SamplingParams(n=3, temperature=1.0, max_tokens=40, seed=1234, ignore_eos=True)
    alone = llm.generate(prompt, params)[0]
    others = [[*p[: 3 + 2 * i]] for i, p in enumerate(random_prompts(17, 50, seed=10))]
    together = llm.generate(
        [*others[:8], prompt, *others[8:]],
        [*[SamplingParams(max_tokens=30)] * 8, params, *[SamplingParams(max_tokens=30, top_p=0.9)] * 9],
    )[8]
    assert [o.token_ids for o in together.outputs] == [o.token_ids for o in alone.outputs]
    assert len({tuple(o.token_ids) for o in alone.outputs}) == 3, "samples of a group differ"
    for a, b in zip(alone.outputs, together.outputs, strict=True):
        assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 1e-5


def test_requests_without_a_seed_differ_and_repeat_with_the_engine(tiny_model: Factory) -> None:
    folder = str(tiny_model("qwen2", extra_eos=4))
    prompt = random_prompts(1, 8)[0]
    runs = []
    for _ in range(2):
        with LLM(folder, seed=5) as fresh:
            runs.append([o.outputs[0].token_ids for o in fresh.generate([prompt] * 3, SamplingParams(max_tokens=12))])
    assert runs[0] == runs[1]
    assert len({tuple(ids) for ids in runs[0]}) == 3


def test_four_prompts_with_sixteen_samples_prefill_four_prompts(tiny_model: Factory) -> None:
    with LLM(str(tiny_model("qwen2", max_len=1024)), max_num_seqs=64) as fresh:
        fresh.generate(random_prompts(4, 512), SamplingParams(n=16, max_tokens=4, ignore_eos=True))
        stats = fresh.stats()
    assert stats.prefill_tokens == 4 * 512
    assert stats.decode_tokens == 4 * 16 * 3
    assert stats.cached_tokens == 4 * 15 * 512
    assert stats.peak_blocks_used == 4 * (512 // 16 + 16 * 1)
    assert stats.sampled_tokens == 4 * 16 * 4


def test_stop_tokens_are_included_and_named(llm: LLM) -> None:
    outputs = llm.generate(random_prompts(8, 5), SamplingParams(n=8, max_tokens=100, seed=3))
    completions = [c for o in outputs for c in o.outputs]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped
    for completion in stopped:
        assert completion.token_ids[-1] == completion.stop_reason
        assert completion.stop_reason in llm.info.eos_token_ids
        assert not set(completion.token_ids[:-1]) & set(llm.info.eos_token_ids)
    ignoring = llm.generate(random_prompts(8, 5), SamplingParams(n=8, max_tokens=100, seed=3, ignore_eos=True))
    assert {c.finish_reason for o in ignoring for c in o.outputs} == {"length"}
    late = llm.generate(random_prompts(8, 5), SamplingParams(n=8, max_tokens=100, min_tokens=30, seed=3))
    assert min(len(c.token_ids) for o in late for c in o.outputs) >= 30


def test_stop_token_ids_of_the_request(llm: LLM) -> None:
    free = llm.generate(random_prompts(1, 5), SamplingParams(max_tokens=50, seed=3, ignore_eos=True))[0].outputs[0]
    wanted = free.token_ids[20]
    params = SamplingParams(max_tokens=50, seed=3, ignore_eos=True, stop_token_ids=[wanted])
    stopped = llm.generate(random_prompts(1, 5), params)[0].outputs[0]
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(wanted) + 1]
    assert stopped.stop_reason == wanted


def test_stop_strings_over_token_boundaries(llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, seed=8, ignore_eos=True)
    free = llm.generate(random_prompts(1, 5), params)[0].outputs[0]
    text = free.text
    assert "\N{REPLACEMENT CHARACTER}" in text or text.isascii()
    clean = [i for i in range(10, len(text) - 4) if text[i : i + 3].isascii() and text.find(text[i : i + 3]) == i]
    assert clean, "the sampled text has three plain characters in a row"
    stop = text[clean[0] : clean[0] + 3]
    stopped = llm.generate(
        random_prompts(1, 5), SamplingParams(max_tokens=60, seed=8, ignore_eos=True, stop=[stop, "never this"])
    )[0].outputs[0]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    assert stop not in stopped.text
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < len(free.token_ids)


def test_text_prompts_and_progress(llm: LLM) -> None:
    output = llm.generate("What is 3 + 4?", SamplingParams(max_tokens=3), use_tqdm=True)[0]
    assert output.prompt_token_ids == llm.engine.encode("What is 3 + 4?")
    assert isinstance(output.outputs[0].text, str)


BAD: list[tuple[Any, dict[str, Any], type[RolloutdError], str]] = [
    ([1] * 250, {"max_tokens": 7}, MaxModelLen, "Lower max_tokens to 6"),
    ([1] * 300, {"max_tokens": 1}, MaxModelLen, "Shorten the prompt"),
    ([], {}, RequestError, "empty"),
    ([1, 512], {}, TokenOutOfRange, "512"),
    ([1, -1], {}, TokenOutOfRange, "-1"),
    ([1], {"n": 0}, RequestError, "n=0"),
    ([1], {"n": 10**9}, RequestError, "n=1000000000"),
    ([1], {"temperature": float("nan")}, RequestError, "temperature=nan"),
    ([1], {"temprature": 1.0}, RequestError, "Did you mean 'temperature'"),
    ([1], {"top_p": 0.0}, RequestError, "top_p"),
    ([1], {"max_tokens": 0}, RequestError, "max_tokens"),
]


@pytest.mark.parametrize(("prompt", "params", "error", "words"), BAD)
def test_bad_requests_are_named_and_cost_nothing(
    llm: LLM, prompt: list[int], params: dict[str, Any], error: type[RolloutdError], words: str
) -> None:
    good = [1, 2, 3]
    with pytest.raises(error, match=words.replace("(", r"\(")):
        llm.generate([good, prompt], SamplingParams.from_dict(params))
    assert llm.generate(good, SamplingParams(max_tokens=1))[0].outputs[0].token_ids


def test_a_request_larger_than_the_pool_is_refused(tiny_model: Factory) -> None:
    block_bytes = 2 * 2 * 16 * 2 * 16 * 4
    with LLM(str(tiny_model("qwen2")), max_model_len=64, kv_cache_bytes=4 * block_bytes) as small:
        small.engine.info = type(small.info)(**{**_fields(small.info), "num_blocks": 2})
        with pytest.raises(RequestExceedsKvPool, match="--kv-cache-bytes"):
            small.generate([1] * 30, SamplingParams(max_tokens=10))


def _fields(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__slots__}


def test_bad_options_are_named(tiny_model: Factory, tmp_path: Path) -> None:
    folder = str(tiny_model("qwen2"))
    with pytest.raises(ConfigError, match="Did you mean 'block_size'"):
        LLM(folder, blok_size=16)
    with pytest.raises(ConfigError, match="max_model_len=5000 > 1024"):
        LLM(folder, max_model_len=5000)
    with pytest.raises(ConfigError, match="KV blocks"):
        LLM(folder, kv_cache_bytes=1000)
    with pytest.raises(ModelNotFound, match="does not exist"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        LLM(str(tmp_path))
    with pytest.raises(ModelNotFound, match="hub"):
        LLM("no-such-org/no-such-model")


def test_a_closed_llm_says_so(tiny_model: Factory) -> None:
    fresh = LLM(str(tiny_model("qwen2")))
    fresh.close()
    with pytest.raises(RequestError, match="closed"):
        fresh.generate([1], SamplingParams(max_tokens=1))


def test_sharded_checkpoints_load(tiny_model: Factory, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model("qwen2")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    params = SamplingParams(max_tokens=8, temperature=0.0)
    with LLM(str(folder)) as whole, LLM(str(tmp_path)) as sharded:
        assert sharded.info.num_parameters == whole.info.num_parameters
        expected = whole.generate([[1, 2, 3]], params)[0].outputs[0].token_ids
        assert sharded.generate([[1, 2, 3]], params)[0].outputs[0].token_ids == expected
