"""Beam search in the scheduler: the beams of a search written down without blocks, and how little memory they take."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rolloutd.errors import RequestError
from rolloutd.sampling_params import SamplingParams
from tests.engine.paged_oracle import expected_beams
from tests.engine.test_scheduler import Bench, prompt_of


def assert_beams(bench: Bench, name: str) -> None:
    group = bench.groups[name]
    params = group.params
    expected = expected_beams(
        list(group.prompt_token_ids),
        width=params.beam_width,
        n=params.n,
        max_tokens=params.max_tokens,
        stop=group.stop_token_ids,
        length_penalty=params.length_penalty,
        early=params.early_stopping,
    )
    outputs = [bench.outputs[name][i] for i in range(params.n)]
    assert [output.token_ids for output in outputs] == [tokens for _, tokens in expected]
    assert [output.beam_score for output in outputs] == pytest.approx([score for score, _ in expected])
    for output in outputs:
        assert len(output.logprobs) == len(output.weight_versions) == len(output.token_ids)
        assert sum(output.logprobs) == pytest.approx(
            (output.beam_score or 0.0) * len(output.token_ids) ** params.length_penalty
        )
        assert (output.finish_reason == "stop") == (output.token_ids[-1] in group.stop_token_ids)


OPTIONS: list[dict[str, Any]] = [
    {"beam_width": 1, "n": 1},
    {"beam_width": 4, "n": 4},
    {"beam_width": 5, "n": 2, "length_penalty": 0.0},
    {"beam_width": 3, "n": 3, "length_penalty": 2.0, "ignore_eos": True},
    {"beam_width": 4, "n": 1, "length_penalty": -1.0},
    {"beam_width": 4, "n": 4, "early_stopping": True},
    {"beam_width": 6, "n": 6, "stop_token_ids": [7, 11, 13, 17, 19, 23]},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_beams_equal_a_search_without_blocks(options: dict[str, Any]) -> None:
    for seed in range(8):
        rng = random.Random(seed)
        bench = Bench(num_blocks=512, max_num_seqs=32, max_num_batched_tokens=rng.choice([3, 16, 64]))
        bench.add("r", prompt_of(rng, rng.randrange(1, 30)), max_tokens=rng.randrange(1, 12), **options)
        bench.finish()
        assert_beams(bench, "r")


@pytest.mark.parametrize("num_blocks", [30, 45, 90])
def test_searches_and_samples_share_a_small_pool(num_blocks: int) -> None:
    """Beams wait for siblings whose blocks are gone; the search that came last steps back, and all end right."""
    preemptions = 0
    for seed in range(6):
        rng = random.Random(seed)
        bench = Bench(num_blocks=num_blocks, max_num_seqs=12, max_num_batched_tokens=rng.choice([8, 64]))
        for i in range(12):
            prompt = prompt_of(rng, rng.randrange(1, 20))
            if rng.random() < 0.6:
                bench.add(f"b{i}", prompt, beam_width=4, n=rng.randrange(1, 5), max_tokens=rng.randrange(2, 16))
            else:
                bench.add(f"s{i}", prompt, n=rng.randrange(1, 4), max_tokens=rng.randrange(2, 16))
        bench.finish()
        for name in bench.groups:
            if name.startswith("b"):
                assert_beams(bench, name)
            else:
                bench.assert_expected(name)
        preemptions += bench.scheduler.counters.num_preemptions
    assert preemptions > 0 or num_blocks > 60


def test_an_aborted_search_returns_its_best_beams() -> None:
    bench = Bench(num_blocks=256)
    bench.add("running", prompt_of(random.Random(1), 9), beam_width=4, n=3, max_tokens=20, ignore_eos=True)
    bench.add("waiting", prompt_of(random.Random(2), 9), beam_width=16, n=2, max_tokens=20, ignore_eos=True)
    for _ in range(3):
        bench.step()
    bench.take(bench.scheduler.abort("running"))
    bench.take(bench.scheduler.abort("waiting"))
    outputs = bench.outputs["running"]
    assert [outputs[i].finish_reason for i in range(3)] == ["abort"] * 3
    assert [len(outputs[i].token_ids) for i in range(3)] == [3] * 3
    assert [output.token_ids for output in bench.outputs["waiting"].values()] == [[], []]
    bench.finish()
    assert bench.scheduler.num_running == bench.scheduler.num_waiting == 0


def test_eight_beams_share_most_of_their_blocks() -> None:
    """Peak blocks of 8 beams, prompt 256 and 64 new tokens, beside 8 copies of one sequence."""
    bench = Bench(num_blocks=4096, block_size=16, max_num_seqs=64, max_num_batched_tokens=512)
    bench.add("r", prompt_of(random.Random(3), 256), beam_width=8, n=8, max_tokens=64, ignore_eos=True)
    bench.finish()
    separate = 8 * -(-(256 + 63) // 16)
    share = bench.blocks.peak_used / separate
    print(f"8 beams: {bench.blocks.peak_used} blocks, 8 copies: {separate}, {share:.1%}")
    assert share < 0.45


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"beam_width": 2, "n": 3}, "n=3 > beam_width=2"),
        ({"beam_width": 2, "temperature": 0.7}, "temperature=0.7 does not go with beam_width=2"),
        ({"beam_width": 2, "stop": ["x"]}, "stop="),
        ({"beam_width": 2, "logit_bias": {3: 1.0}}, "logit_bias="),
        ({"beam_width": 2, "bad_token_ids": [3]}, "bad_token_ids="),
        ({"beam_width": 2, "logits_processors": [len]}, "logits_processors="),
        ({"beam_width": 2, "logprobs": 5}, "logprobs=5 does not go with beam_width=2"),
        ({"beam_width": 1000}, "beam_width=1000 is outside"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"early_stopping": 1}, "early_stopping=1 is not a bool"),
    ],
)
def test_what_does_not_go_with_beams_is_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**params)
