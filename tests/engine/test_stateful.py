"""Scheduler, block manager and prefix cache as one state machine: 10,000 steps by hypothesis, checked after each.

The model is the oracle that holds real slots (`paged_oracle.py`) and, at the end, the completions that each sample and
each search must have had in any company.
"""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rolloutd.engine.sequence import SequenceState
from tests.engine.paged_oracle import VOCAB
from tests.engine.test_beam_search import assert_beams
from tests.engine.test_scheduler import Bench

MAX_EXAMPLES, STEPS_PER_EXAMPLE = 120, 100
MAX_LEN = 40
SEEN: Counter[str] = Counter()
"""What happened over all examples, so that the test can say that it exercised what it is about."""


class EngineMachine(RuleBasedStateMachine):
    """Requests come, go and share prefixes while weights change, in a pool that may be too small for two of them."""

    @initialize(
        num_blocks=st.integers(MAX_LEN // 4 + 26, 90),
        seats=st.sampled_from([4, 9, 20]),
        budget=st.sampled_from([5, 16, 200]),
        caching=st.sampled_from([True, True, True, False]),
        max_steps=st.sampled_from([1, 2, 8]),
    )
    def start(self, num_blocks: int, seats: int, budget: int, caching: bool, max_steps: int) -> None:
        self.bench = Bench(
            num_blocks=num_blocks,
            max_num_seqs=seats,
            max_num_batched_tokens=budget,
            prefix_caching=caching,
            max_steps=max_steps,
        )
        self.touched: set[str] = set()
        """Requests that were cut short on purpose."""
        self.turns: list[list[int]] = [[1, 2, 3, 4, 5, 6, 7]]

    @rule(
        stem=st.integers(0, 30),
        cut=st.integers(1, 24),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=6),
        n=st.sampled_from([1, 1, 2, 4, 11]),
        max_tokens=st.integers(1, 10),
        budget=st.sampled_from([None, None, None, 7]),
    )
    def add_samples(self, stem: int, cut: int, tail: list[int], n: int, max_tokens: int, budget: int | None) -> None:
        name = f"s{len(self.bench.groups)}"
        prompt = [*self.turns[stem % len(self.turns)][:cut], *tail]
        self.bench.add(name, prompt, n=n, max_tokens=max_tokens, group_token_budget=budget)
        if budget is not None:
            self.touched.add(name)

    @rule(stem=st.integers(0, 30), cut=st.integers(1, 12), width=st.integers(1, 4), max_tokens=st.integers(1, 8))
    def add_search(self, stem: int, cut: int, width: int, max_tokens: int) -> None:
        name = f"b{len(self.bench.groups)}"
        prompt = self.turns[stem % len(self.turns)][:cut]
        self.bench.add(name, prompt, beam_width=width, n=width, max_tokens=max_tokens)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        before = {name: set(outputs) for name, outputs in self.bench.outputs.items()}
        for _ in range(count):
            self.bench.step()
        for name, outputs in self.bench.outputs.items():
            for index in set(outputs) - before[name]:
                whole = [*self.bench.groups[name].prompt_token_ids, *outputs[index].token_ids]
                self.turns.append(whole[: MAX_LEN - 16])  # the next turn of a conversation begins with it

    @precondition(lambda self: self.bench.scheduler.has_unfinished())
    @rule(pick=st.randoms(use_true_random=False), samples=st.none() | st.sets(st.integers(0, 12), max_size=4))
    def abort(self, pick: random.Random, samples: set[int] | None) -> None:
        name = pick.choice([name for name in self.bench.groups if name in self.bench.scheduler])
        ended = self.bench.scheduler.abort(name, samples)
        self.bench.take(ended)
        if ended:
            self.touched.add(name)
            SEEN["aborted"] += 1
        if samples is not None and not name.startswith("b"):
            assert {done.completion.index for done in ended} <= samples

    @rule(tokens=st.sampled_from([1, 3, 12, 1 << 30, 1 << 30]))
    def take_or_give_memory(self, tokens: int) -> None:
        self.bench.runner.memory_tokens = tokens

    @rule(policy=st.sampled_from(["keep", "recompute"]))
    def change_weights(self, policy: str) -> None:
        self.bench.take(self.bench.pipeline.settle())
        assert self.bench.scheduler.weights_changed(policy) == []  # type: ignore[arg-type]
        self.bench.version += 1

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.check()
        scheduler = self.bench.scheduler
        live = [sequence for sequence in scheduler.live_sequences() if sequence.state is not SequenceState.FINISHED]
        if not scheduler._searches:
            running = sum(sequence.state is SequenceState.RUNNING for sequence in live)
            assert scheduler.num_running == running <= scheduler._max_num_seqs
        waiting = sum(sequence.state is SequenceState.WAITING for sequence in live)
        unseated = sum(group.num_unseated for group in scheduler._groups.values())
        assert scheduler.num_waiting == waiting + unseated
        SEEN["steps"] += 1

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.finish()
        counters = self.bench.scheduler.counters
        SEEN["preemptions"] += counters.num_preemptions
        SEEN["prefix hits"] += counters.prefix_hits
        SEEN["copies"] += counters.block_copies
        SEEN["out of memory"] += counters.num_out_of_memory
        SEEN["runs"] += self.bench.runner.num_runs
        SEEN["continued"] += self.bench.runner.num_continued
        for name, group in self.bench.groups.items():
            assert sorted(self.bench.outputs[name]) == list(range(group.params.n))
            if name in self.touched:
                budget = group.params.group_token_budget
                total = sum(len(output.token_ids) for output in self.bench.outputs[name].values())
                assert budget is None or total <= budget
            elif name.startswith("b"):
                assert_beams(self.bench, name)
            else:
                self.bench.assert_expected(name)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=MAX_EXAMPLES,
    stateful_step_count=STEPS_PER_EXAMPLE,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),  # shrinking takes minutes; remove this to see the shortest failing run
)


def test_the_machine_did_what_it_is_about() -> None:
    """Runs after it: counts over all examples."""
    print(dict(SEEN))
    assert SEEN["steps"] >= 10_000
    events = ("preemptions", "prefix hits", "copies", "aborted", "runs", "continued", "out of memory")
    assert min(SEEN[what] for what in events) > 100
