"""The simulator, and what it shows: bounded waits, no leak, little KV wasted, and a cost that counts work, not time."""

from __future__ import annotations

import gc
import sys
from itertools import pairwise

import pytest

from rolloutd.engine.sequence import Group, Sequence
from rolloutd.engine.simulation import Load, simulate
from rolloutd.engine.waiting import MAX_OVERTAKEN, LengthHistory, WaitingGroups
from tests.engine.test_scheduler import Bench


def test_all_requests_finish_and_nothing_leaks() -> None:
    report = simulate(Load(500, num_blocks=400))
    assert report.num_completions == 500 * 4
    assert report.leaked_blocks == 0
    assert report.num_preemptions > 0


@pytest.mark.parametrize("num_requests", [300, 3000])
def test_no_group_waits_longer_than_the_bound(num_requests: int) -> None:
    """Longest first alone would let the shortest of 3,000 wait for all others."""
    report = simulate(Load(num_requests, samples=1, max_num_seqs=16))
    assert report.most_overtaken == MAX_OVERTAKEN


def test_work_per_scheduled_token_does_not_grow_with_the_queue() -> None:
    """Counted, not timed: Python function calls per scheduled token, with a queue of 200 and of 3,200 requests."""

    def calls_per_token(num_requests: int) -> float:
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        try:
            report = simulate(Load(num_requests, samples=2, num_blocks=600))
        finally:
            sys.setprofile(None)
        return calls / report.scheduled_tokens

    few, many = calls_per_token(200), calls_per_token(3_200)
    print(f"calls per scheduled token: {few:.2f} at 200 requests, {many:.2f} at 3,200")
    assert many < 1.1 * few


def test_kv_waste_stays_below_four_percent() -> None:
    """2,000 random requests of mean length 600, prompt and completion: only last blocks are partly empty."""
    load = Load(
        2_000, samples=1, mean_prompt_len=400, mean_completion_len=200, max_num_seqs=64, num_blocks=8192, seed=1
    )
    report = simulate(load)
    print(f"KV slots allocated and unused: {report.kv_waste:.2%}, {report.num_steps} steps")
    assert report.kv_waste < 0.04
    assert report.leaked_blocks == 0


def group_of(bench: Bench, name: str, prompt: list[int], max_tokens: int) -> None:
    bench.add(name, prompt, max_tokens=max_tokens, ignore_eos=True)


def test_the_longest_expected_completion_starts_first() -> None:
    bench = Bench(max_num_seqs=1)
    for name, max_tokens in [("short", 2), ("long", 9), ("middle", 5)]:
        group_of(bench, name, [1, 2, 3], max_tokens)
    bench.finish()
    tickets = sorted(bench.groups, key=lambda name: bench.groups[name].ticket)
    assert tickets == ["long", "middle", "short"]


def test_equal_expectations_keep_the_order_of_arrival() -> None:
    bench = Bench(max_num_seqs=2, num_blocks=256)
    names = [f"r{i}" for i in range(20)]
    for i, name in enumerate(names):
        group_of(bench, name, [i, 1, 2], 4)
    bench.finish()
    assert sorted(names, key=lambda name: bench.groups[name].ticket) == names


def test_a_known_prompt_is_expected_to_take_as_long_as_before() -> None:
    bench = Bench(max_num_seqs=1)
    group_of(bench, "first", [1, 2], 3)
    bench.finish()
    group_of(bench, "known", [1, 2], 30)
    group_of(bench, "unknown", [2, 1], 20)
    bench.finish()
    assert bench.groups["unknown"].ticket < bench.groups["known"].ticket


def test_the_history_forgets_the_oldest_prompts() -> None:
    history = LengthHistory(capacity=2)
    bench = Bench()
    groups = [bench.add(f"r{i}", [i], max_tokens=50) for i in range(3)]
    for group in groups:
        history.record(group, 10)
    assert [history.expected_len(group) for group in groups] == [50.0, 10.0, 10.0]
    history.record(groups[2], 30)
    assert history.expected_len(groups[2]) == 0.75 * 10 + 0.25 * 30


def test_no_arrival_is_overtaken_more_often_than_allowed() -> None:
    """Short ones that came first, and long ones that keep coming."""
    waiting, bench, order = WaitingGroups(max_overtaken=5), Bench(), []
    arrivals = 0
    for _ in range(60):
        for _ in range(2):
            group = bench.add(f"r{arrivals}", [1], max_tokens=arrivals + 1)
            waiting.add(group, float(arrivals))
            arrivals += 1
        chosen = waiting.peek()
        assert chosen is not None
        waiting.remove(chosen)
        order.append(int(chosen.request_id[1:]))
    for place, arrival in enumerate(order):
        assert place - arrival <= 5
    assert any(later < earlier for earlier, later in pairwise(order))


def test_admitted_groups_are_not_remembered() -> None:
    """A backlog that never empties: what was admitted must not pile up behind it."""
    waiting, bench = WaitingGroups(max_overtaken=3), Bench()
    for i in range(400):
        group = bench.add(f"r{i}", [1], max_tokens=1 + i % 50)
        waiting.add(group, float(i % 50))
        if i >= 20:
            chosen = waiting.peek()
            assert chosen is not None
            waiting.remove(chosen)
    assert len(waiting) == 20
    assert len(waiting._by_length) <= 2 * 20 + 3
    assert len(waiting._by_arrival) <= 20 + 3 + 1


def test_finished_groups_are_freed_at_once() -> None:
    """By their reference counts: the engine process lets the garbage collector run rarely."""

    def count() -> int:
        return sum(isinstance(item, (Group, Sequence)) for item in gc.get_objects())

    bench = Bench()
    gc.collect()
    gc.disable()
    try:
        before = count()
        bench.add("r", [1, 2, 3], n=3, max_tokens=4)
        bench.add("b", [1, 2, 3], beam_width=3, n=2, max_tokens=4)
        bench.step()
        assert count() >= before + 2 + 4
        bench.finish()
        bench.groups.clear()
        assert count() == before
    finally:
        gc.enable()


def test_an_id_that_comes_again_is_a_new_arrival() -> None:
    waiting, bench = WaitingGroups(), Bench()
    first = bench.add("r", [1], max_tokens=5)
    waiting.add(first, 9.0)
    waiting.remove(first)
    waiting.remove(first)
    second = Bench().add("r", [1], max_tokens=5)
    waiting.add(second, 1.0)
    assert len(waiting) == 1
    assert waiting.peek() is second


def test_siblings_of_a_group_that_began_come_before_new_groups() -> None:
    bench = Bench(max_num_seqs=3, num_blocks=256)
    bench.add("large", [1, 2, 3, 4, 5], n=8, max_tokens=4, ignore_eos=True)
    group_of(bench, "longer", [9, 9], 4)
    for _ in range(4):
        bench.step()
    group_of(bench, "longest", [8, 8], 40)
    while len(bench.outputs["large"]) < 8:
        bench.step()
        assert bench.groups["longest"].ticket < 0 or bench.groups["large"].num_unseated == 0
    bench.finish()
    bench.assert_expected("large")


def test_a_group_stops_at_its_token_budget() -> None:
    bench = Bench(max_num_seqs=4, num_blocks=256)
    group = bench.add("r", [1, 2, 3], n=6, max_tokens=50, ignore_eos=True, group_token_budget=30)
    bench.finish()
    lengths = {index: len(output.token_ids) for index, output in bench.outputs["r"].items()}
    assert sum(lengths.values()) == 30 == group.num_sampled
    assert {output.finish_reason for output in bench.outputs["r"].values()} == {"length"}
    assert lengths[4] == lengths[5] == 0  # never seated


def test_one_sample_is_aborted_and_its_siblings_go_on() -> None:
    bench = Bench(max_num_seqs=4, num_blocks=256)
    bench.add("r", [1, 2, 3], n=6, max_tokens=12, ignore_eos=True)
    bench.step()
    bench.step()
    ended = bench.scheduler.abort("r", [1, 5])
    bench.take(ended)
    assert [(done.completion.index, len(done.completion.token_ids)) for done in ended] == [(1, 2), (5, 0)]
    assert bench.scheduler.abort("r", [1, 5, 99]) == []
    bench.finish()
    assert [len(bench.outputs["r"][i].token_ids) for i in range(6)] == [12, 2, 12, 12, 12, 0]


def test_aborting_the_leader_hands_the_prefill_to_a_sibling() -> None:
    bench = Bench(max_num_batched_tokens=4, num_blocks=256)
    bench.add("r", list(range(20)), n=3, max_tokens=5, ignore_eos=True)
    bench.step()
    bench.take(bench.scheduler.abort("r", [0]))
    bench.finish()
    assert [len(bench.outputs["r"][i].token_ids) for i in range(3)] == [0, 5, 5]


def test_each_turn_of_a_conversation_computes_only_what_is_new() -> None:
    """Turn k + 1 extends turn k's blocks, the partly filled last one included."""
    bench = Bench(block_size=16, num_blocks=64, max_num_batched_tokens=512)
    prompt = list(range(21))
    for turn in range(6):
        before = bench.scheduler.counters.prefill_tokens
        bench.add(f"t{turn}", prompt, max_tokens=5, ignore_eos=True)
        bench.finish()
        bench.assert_expected(f"t{turn}")
        prefilled = bench.scheduler.counters.prefill_tokens - before
        # New: the question of 3 tokens, and the last token sampled, which was never computed.
        assert prefilled == (21 if turn == 0 else 3 + 1)
        prompt = [*prompt, *bench.outputs[f"t{turn}"][0].token_ids, 7, 8, 9]
    counters = bench.scheduler.counters
    assert counters.prefix_hits / counters.prefix_queries > 0.7


def test_prompts_that_part_inside_a_block_share_what_is_common() -> None:
    bench = Bench(block_size=16, num_blocks=64, max_num_batched_tokens=512)
    stem = list(range(10))
    bench.add("a", [*stem, 40, 41, 42, 43, 44, 45, 46, 47], max_tokens=2, ignore_eos=True)
    bench.finish()
    before = bench.scheduler.counters.prefill_tokens
    for name, ending in [("b", 30), ("c", 31)]:
        bench.add(name, [*stem, ending, 2, 3], max_tokens=9, ignore_eos=True)
    bench.add("a again", [*stem, 40, 41, 42, 43, 44, 45, 46, 47, 48], max_tokens=2, ignore_eos=True)
    bench.finish()
    for name in bench.groups:
        bench.assert_expected(name)
    # b and c compute what follows the stem; a's block was left as it was.
    assert bench.scheduler.counters.prefill_tokens - before == 3 + 3 + 1
