"""Runs of several steps: the same completions as step by step, whatever ends on the way, and no block lost."""

from __future__ import annotations

import dataclasses
import random
from array import array

import pytest

from rolloutd.outputs import TopLogprobs
from tests.engine.paged_oracle import expected_output
from tests.engine.test_scheduler import STOP, Bench, prompt_of

FIRST = 0x4E00


def to_text(ids: object) -> str:
    """Return one character for each token."""
    return "".join(chr(FIRST + i) for i in ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize("max_steps", [2, 4, 8, 16])
@pytest.mark.parametrize("num_blocks", [40, 400])
def test_random_traffic_gives_what_it_gives_step_by_step(max_steps: int, num_blocks: int) -> None:
    rng = random.Random(max_steps)
    bench = Bench(num_blocks=num_blocks, max_num_seqs=12, max_steps=max_steps)
    for i in range(120):
        length = rng.choice([1, 3, 8, 17])
        bench.add(f"r{i}", prompt_of(rng, length), n=rng.choice([1, 2, 5]), max_tokens=rng.choice([1, 2, 7, 30]))
        for _ in range(rng.choice([0, 1, 3])):
            bench.step()
    bench.finish()
    for name in bench.groups:
        bench.assert_expected(name)
    assert bench.runner.num_runs > 20
    assert bench.runner.num_continued > 0


def test_most_steps_of_long_completions_are_launched_before_the_last_answer_is_read() -> None:
    bench = Bench(num_blocks=4096, block_size=16, max_num_seqs=64, max_num_batched_tokens=4096, max_steps=8)
    for i in range(6):
        bench.add(f"r{i}", prompt_of(random.Random(i), 48), n=8, max_tokens=200, ignore_eos=True)
    bench.finish()
    runner = bench.runner
    # The prefill gives the first token, a step that copies nothing is a run at once, and 199 = 24 x 8 + 7.
    assert runner.num_runs == 25
    assert runner.num_continued == 24
    assert runner.num_vain_steps == 0
    assert bench.scheduler.counters.num_steps == 1 + 199
    assert bench.scheduler.counters.decode_tokens == 48 * 199


def test_the_tail_runs_half_as_long() -> None:
    bench = Bench(num_blocks=400, max_num_seqs=4, max_steps=8)
    bench.add("r", [1, 2, 3, 4], max_tokens=41, ignore_eos=True)
    bench.finish()
    assert bench.runner.num_runs == 10


def test_a_stop_string_cuts_what_the_device_drew_beyond_it() -> None:
    bench = Bench(num_blocks=400, max_num_seqs=16, max_steps=8, decode=to_text)
    rng = random.Random(5)
    wanted = {}
    for i in range(40):
        prompt = prompt_of(rng, 5)
        tokens = expected_output(prompt, seed=i, index=0, max_tokens=40, stop=STOP)
        at = rng.randrange(len(tokens))
        stop = to_text(tokens[at : at + 2])
        end = to_text(tokens).find(stop) + len(stop)
        wanted[f"r{i}"] = tokens[:end]
        bench.add(f"r{i}", prompt, max_tokens=40, stop=[stop])
    bench.finish()
    for name, tokens in wanted.items():
        output = bench.outputs[name][0]
        assert output.token_ids == tokens
        assert len(output.logprobs) == len(output.sampling_logprobs) == len(output.weight_versions) == len(tokens)


def test_an_abort_while_two_runs_are_launched_frees_the_blocks_at_once() -> None:
    bench = Bench(num_blocks=60, max_num_seqs=8, max_steps=8)
    for i in range(4):
        bench.add(f"r{i}", prompt_of(random.Random(i), 6), max_tokens=50, ignore_eos=True)
    while bench.runner.num_continued == 0:
        bench.step()
    bench.pipeline.fill(0)
    assert len(bench.runner.launched) == 2
    before = bench.blocks.num_used
    bench.take(bench.scheduler.abort("r1"))
    assert bench.blocks.num_used < before
    bench.add("late", prompt_of(random.Random(9), 9), n=3, max_tokens=20, ignore_eos=True)  # takes those blocks
    bench.finish()
    for name in ("r0", "r2", "r3", "late"):
        bench.assert_expected(name)


def test_a_newcomer_waits_for_what_is_launched_and_no_longer() -> None:
    bench = Bench(num_blocks=400, max_num_seqs=8, max_steps=8)
    bench.add("long", [1, 2, 3], max_tokens=500, ignore_eos=True)
    while bench.runner.num_continued == 0:
        bench.step()
    new = bench.add("new", [4, 5, 6], max_tokens=5, ignore_eos=True)
    bench.step()  # reads the run that is still launched
    assert new.ticket < 0
    bench.step()
    assert new.ticket >= 0
    bench.finish()
    bench.assert_expected("new")
    bench.assert_expected("long")


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 0.5},
        {"logprobs": 3},
        {"logit_bias": {"4": 1.0}},
        {"group_token_budget": 90},
        {"min_tokens": 60},
        {"stop_token_ids": list(range(30, 40))},
    ],
)
def test_what_needs_the_host_between_tokens_takes_single_steps(params: dict[str, object]) -> None:
    bench = Bench(num_blocks=400, max_num_seqs=8, max_steps=8)
    group = bench.add("r", [1, 2, 3], max_tokens=60, **params)
    if "logit_bias" in params:
        group.rules = object()  # type: ignore[assignment]
    for _ in range(3):
        batch = bench.scheduler.schedule(8)
        assert batch.num_steps == 1
        if group.params.num_top_logprobs:  # which the oracle does not have
            top = {i: TopLogprobs(3, array("i", [0, 1, 2]), array("f", [-1.0, -2.0, -3.0])) for i in (0,)}
            sampled = dataclasses.replace(bench.runner.run(batch).result(), top_logprobs=top)
        else:
            sampled = bench.runner.run(batch).result()
        bench.scheduler.commit(batch, sampled, weight_version=0)


def test_a_pool_without_room_for_a_run_goes_step_by_step() -> None:
    bench = Bench(num_blocks=6, block_size=4, max_num_seqs=2, max_steps=64)
    for i in range(2):
        bench.add(f"r{i}", [i, 1, 2], max_tokens=20, ignore_eos=True)
    bench.finish()
    assert bench.scheduler.counters.num_preemptions > 0
    bench.assert_expected("r0")
    bench.assert_expected("r1")
