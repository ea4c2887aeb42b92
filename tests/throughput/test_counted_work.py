"""Throughput that cannot quietly regress: work is counted, never timed, so the counts hold on any machine."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rolloutd import LLM, SamplingParams
from rolloutd.outputs import EngineStats

Factory = Callable[..., Path]


def prompts_of(count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for _ in range(count)]


def stats_of(folder: Path, prompts: list[list[int]], params: SamplingParams, **options: int) -> EngineStats:
    with LLM(str(folder), **options) as llm:
        llm.generate(prompts, params)
        return llm.stats()


@pytest.mark.parametrize(("count", "length", "n", "new"), [(4, 512, 16, 4), (8, 128, 8, 20), (3, 37, 5, 9)])
def test_tokens_steps_and_blocks_of_a_grpo_batch(
    tiny_model: Factory, count: int, length: int, n: int, new: int
) -> None:
    params = SamplingParams(n=n, max_tokens=new, ignore_eos=True)
    stats = stats_of(tiny_model("qwen2"), prompts_of(count, length), params, max_num_seqs=64)
    computed = length + new - 1  # the last sampled token is never computed
    own = -(-computed // 16) - length // 16
    assert stats.prefill_tokens == count * length
    assert stats.decode_tokens == count * n * (new - 1)
    assert stats.sampled_tokens == count * n * new
    assert stats.num_steps == new
    assert stats.peak_blocks_used == count * (length // 16 + n * own)
    assert stats.block_copies == (count * (n - 1) if length % 16 else 0)
    assert stats.num_preemptions == 0


def test_steps_of_ragged_lengths_stay_near_the_floor(tiny_model: Factory) -> None:
    """64 sequences of 1 to 32 tokens in 16 seats: refilling keeps seats busy, waiting would take 32 x 4."""
    rng = random.Random(1)
    lengths = [rng.randrange(1, 33) for _ in range(64)]
    with LLM(str(tiny_model("qwen2")), max_num_seqs=16) as llm:
        llm.generate(prompts_of(64, 8), [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths])
        stats = llm.stats()
    floor = sum(lengths) / 16
    assert stats.num_steps <= floor + 32
    assert stats.num_steps < 4 * 32 * 0.75


def test_a_second_turn_prefills_only_what_is_new(tiny_model: Factory) -> None:
    with LLM(str(tiny_model("qwen2"))) as llm:
        first = llm.generate(prompts_of(1, 100), SamplingParams(max_tokens=29, ignore_eos=True))[0]
        before = llm.stats().prefill_tokens
        turn = [*first.prompt_token_ids, *first.outputs[0].token_ids, *prompts_of(1, 20, seed=2)[0]]
        llm.generate([turn], SamplingParams(max_tokens=2))
        assert llm.stats().prefill_tokens - before == len(turn) - 128 // 16 * 16
