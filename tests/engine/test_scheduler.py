"""The scheduler and the block manager under random traffic, against an oracle that holds real slots."""

from __future__ import annotations

import random

import pytest

from rolloutd.engine.block_manager import BlockManager
from rolloutd.engine.pipeline import Pipeline
from rolloutd.engine.scheduler import Scheduler
from rolloutd.engine.sequence import Group, Request
from rolloutd.engine.stop import Decode
from rolloutd.outputs import CompletionOutput, FinishedCompletion
from rolloutd.sampling_params import SamplingParams
from tests.engine.paged_oracle import VOCAB, OracleRunner, expected_output

STOP = frozenset({3})


class Bench:
    """A scheduler with its oracle, stepped by hand."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 64,
        prefix_caching: bool = True,
        max_steps: int = 1,
        decode: Decode | None = None,
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=prefix_caching)
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, decode=decode
        )
        self.runner = OracleRunner(block_size, max_steps)
        self.pipeline = Pipeline(self.scheduler, self.runner)
        self.version = 0
        self.groups: dict[str, Group] = {}
        self.outputs: dict[str, dict[int, CompletionOutput]] = {}
        self.scores: dict[str, list[float] | None] = {}

    def add(self, name: str, prompt: list[int], **params: object) -> Group:
        request = Request(name, tuple(prompt), SamplingParams.from_dict(params))
        group = Group.from_request(request, seed=len(self.groups), eos_token_ids=STOP)
        self.groups[name] = group
        self.outputs[name] = {}
        self.scheduler.add(group)
        return group

    def take(self, finished: list[FinishedCompletion]) -> None:
        for done in finished:
            assert done.completion.index not in self.outputs[done.request_id], "a sample was delivered twice"
            self.outputs[done.request_id][done.completion.index] = done.completion
            self.scores[done.request_id] = done.prompt_logprobs
            assert done.is_last == (len(self.outputs[done.request_id]) == self.groups[done.request_id].params.n)

    def step(self) -> None:
        self.pipeline.fill(self.version)
        self.check()
        self.take(self.pipeline.commit_next())
        self.check()

    def check(self) -> None:
        self.blocks.check_invariants(self.scheduler.live_sequences())

    def finish(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished() and not self.pipeline:
                break
            self.step()
        assert not self.scheduler.has_unfinished(), "work was left undone"
        assert self.blocks.num_used == 0, "a block leaked"

    def assert_expected(self, name: str) -> None:
        group = self.groups[name]
        assert sorted(self.outputs[name]) == list(range(group.params.n))
        for index, output in self.outputs[name].items():
            expected = expected_output(
                list(group.prompt_token_ids),
                seed=group.seed,
                index=index,
                max_tokens=group.params.max_tokens,
                stop=group.stop_token_ids,
            )
            assert output.token_ids == expected
            assert output.finish_reason == ("stop" if expected[-1] in group.stop_token_ids else "length")
            lengths = {len(output.logprobs), len(output.sampling_logprobs), len(output.weight_versions)}
            assert lengths == {len(expected)}


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


def test_one_prefill_serves_all_samples_of_a_prompt() -> None:
    bench = Bench(num_blocks=4096, block_size=16, max_num_seqs=64, max_num_batched_tokens=8192)
    rng = random.Random(0)
    for i in range(4):
        bench.add(f"r{i}", prompt_of(rng, 512), n=16, max_tokens=40, ignore_eos=True)
    bench.step()
    # Full blocks of the prompt are shared: 4 x 32; nothing else is held before the first decode step.
    assert bench.blocks.num_used == 4 * 512 // 16
    bench.finish()
    counters = bench.scheduler.counters
    assert counters.prefill_tokens == 4 * 512
    assert counters.decode_tokens == 4 * 16 * 39  # the last sampled token is never computed
    assert counters.cached_tokens == 4 * 15 * 512
    # Each sample holds its own blocks for positions 512 ... 512 + 39 - 1, beside the shared ones.
    assert bench.blocks.peak_used == 4 * (512 // 16 + 16 * -(-39 // 16))
    assert counters.block_copies == 0


def test_blocks_in_use_match_the_formula_when_the_prompt_ends_inside_a_block() -> None:
    bench = Bench(num_blocks=256, block_size=16, max_num_seqs=64)
    prompt_len, n, steps = 37, 8, 5
    bench.add("r", prompt_of(random.Random(1), prompt_len), n=n, max_tokens=50, ignore_eos=True)
    for _ in range(1 + steps):
        bench.step()
    shared = prompt_len // 16
    own = -(-(prompt_len + steps) // 16) - shared
    assert bench.blocks.num_used == shared + n * own
    assert bench.scheduler.counters.block_copies == n - 1  # the last holder of the partial block writes in place
    bench.finish()


def test_a_finished_sequence_is_replaced_in_the_next_step() -> None:
    bench = Bench(max_num_seqs=2)
    rng = random.Random(2)
    bench.add("short", prompt_of(rng, 3), max_tokens=2, ignore_eos=True)
    bench.add("long", prompt_of(rng, 3), max_tokens=9, ignore_eos=True)
    bench.add("next", prompt_of(rng, 3), max_tokens=2, ignore_eos=True)
    bench.step()
    bench.step()
    assert "short" not in bench.scheduler
    assert bench.scheduler.num_waiting == 1
    bench.step()
    assert bench.scheduler.num_waiting == 0
    assert bench.scheduler.num_running == 2
    bench.finish()


@pytest.mark.parametrize("budget", [1, 3, 7, 64])
def test_chunked_prefill_computes_each_token_once(budget: int) -> None:
    bench = Bench(max_num_batched_tokens=budget)
    bench.add("r", prompt_of(random.Random(3), 41), n=3, max_tokens=6)
    bench.finish()
    bench.assert_expected("r")
    assert bench.runner.max_batch_tokens <= budget
    assert bench.scheduler.counters.prefill_tokens == 41


def test_a_later_request_reuses_the_prefix_of_an_earlier_one() -> None:
    bench = Bench(num_blocks=256, max_num_batched_tokens=512)
    rng = random.Random(4)
    prompt = prompt_of(rng, 100)
    bench.add("first", prompt, max_tokens=4)
    bench.finish()
    before = bench.scheduler.counters.prefill_tokens
    bench.add("second", [*prompt, *prompt_of(rng, 10)], max_tokens=4)
    bench.finish()
    assert bench.scheduler.counters.prefill_tokens - before == 10
    bench.add("again", prompt, max_tokens=4)
    bench.finish()
    assert bench.scheduler.counters.prefill_tokens - before == 10 + 1  # only the last token, for its logits
    bench.assert_expected("second")


def test_prefixes_die_with_their_weights() -> None:
    bench = Bench(num_blocks=256, max_num_batched_tokens=512)
    prompt = prompt_of(random.Random(5), 64)
    bench.add("old", prompt, max_tokens=2)
    bench.finish()
    bench.take(bench.scheduler.weights_changed("keep"))
    bench.version = 1
    before = bench.scheduler.counters.prefill_tokens
    bench.add("new", prompt, max_tokens=2)
    bench.finish()
    assert bench.scheduler.counters.prefill_tokens - before == 64
    assert bench.outputs["new"][0].weight_versions == [1] * len(bench.outputs["new"][0].token_ids)


@pytest.mark.parametrize("policy", ["keep", "recompute", "abort"])
@pytest.mark.parametrize("length", [3, 11, 16, 17, 30])
@pytest.mark.parametrize("n", [1, 2])
def test_kv_of_old_weights_is_found_by_nobody(policy: str, length: int, n: int) -> None:
    """Nor what a sequence gives up as the weights change: not even a block that is filled in part."""
    bench = Bench(num_blocks=64, block_size=16)
    prompt = prompt_of(random.Random(6), length)
    bench.add("r", prompt, n=n, max_tokens=10, ignore_eos=True)
    for _ in range(3):
        bench.step()
    counters = bench.scheduler.counters
    prefilled, cached = counters.prefill_tokens, counters.cached_tokens
    bench.take(bench.scheduler.weights_changed(policy))  # type: ignore[arg-type]
    bench.version = 1
    for _ in range(2):
        bench.step()
    assert counters.cached_tokens == cached
    assert counters.prefill_tokens - prefilled == (n * (length + 3) if policy == "recompute" else 0)
    bench.scheduler.abort("r")
    bench.add("next", prompt, max_tokens=1)
    bench.finish()
    if policy != "recompute":
        assert counters.cached_tokens == cached


@pytest.mark.parametrize("policy", ["keep", "recompute", "abort"])
def test_what_runs_follows_its_policy_when_weights_change(policy: str) -> None:
    bench = Bench(num_blocks=256)
    prompt = prompt_of(random.Random(6), 30)
    bench.add("r", prompt, n=2, max_tokens=10, ignore_eos=True)
    for _ in range(4):
        bench.step()
    prefilled = bench.scheduler.counters.prefill_tokens
    bench.take(bench.scheduler.weights_changed(policy))  # type: ignore[arg-type]
    bench.version = 1
    bench.check()
    bench.finish()
    outputs = bench.outputs["r"]
    if policy == "abort":
        assert {output.finish_reason for output in outputs.values()} == {"abort"}
        return
    bench.assert_expected("r")
    assert all(output.weight_versions == [0] * 4 + [1] * 6 for output in outputs.values())
    recomputed = bench.scheduler.counters.prefill_tokens - prefilled
    assert (recomputed > 0) == (policy == "recompute")
    # KV that two versions computed must not be found by the next request.
    before = bench.scheduler.counters.cached_tokens
    bench.add("next", prompt, max_tokens=1)
    bench.finish()
    assert (bench.scheduler.counters.cached_tokens == before) == (policy == "keep")


def test_preemption_loses_nothing() -> None:
    longest = 20 + 30
    bench = Bench(num_blocks=-(-longest // 4) + 3, max_num_seqs=16, max_num_batched_tokens=32)
    rng = random.Random(7)
    for i in range(20):
        bench.add(f"r{i}", prompt_of(rng, rng.randrange(1, 20)), n=rng.choice([1, 2, 5]), max_tokens=30)
    bench.finish()
    assert bench.scheduler.counters.num_preemptions > 0
    for i in range(20):
        bench.assert_expected(f"r{i}")


def test_a_group_larger_than_the_seats_is_seated_in_turns() -> None:
    bench = Bench(num_blocks=512, max_num_seqs=8, max_num_batched_tokens=64)
    bench.add("r", prompt_of(random.Random(8), 33), n=50, max_tokens=7)
    bench.finish()
    bench.assert_expected("r")
    # Late samples find the prompt in the prefix cache: only its last token is computed again.
    assert bench.scheduler.counters.prefill_tokens < 33 + 50


def test_prompt_scores_are_complete_whatever_the_chunks() -> None:
    for budget in (1, 5, 64):
        bench = Bench(max_num_batched_tokens=budget)
        prompt = prompt_of(random.Random(9), 23)
        bench.add("warm", prompt, max_tokens=1)
        bench.finish()
        bench.add("r", prompt, max_tokens=0, prompt_logprobs=1)
        bench.finish()
        scores = bench.scores["r"]
        assert scores is not None
        assert scores[0] != scores[0]
        assert scores[1:] == [float(-t) for t in prompt[1:]]
        assert bench.outputs["r"][0].token_ids == []


def test_abort_returns_what_there_is() -> None:
    bench = Bench()
    bench.add("r", prompt_of(random.Random(10), 9), n=3, max_tokens=20, ignore_eos=True)
    bench.step()
    bench.step()
    ended = bench.scheduler.abort("r")
    bench.take(ended)
    assert [done.completion.finish_reason for done in ended] == ["abort"] * 3
    assert [len(done.completion.token_ids) for done in ended] == [2] * 3
    assert bench.scheduler.abort("r") == []
    bench.finish()


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_leaks_no_block_and_loses_no_sample(seed: int) -> None:
    """5,000 operations over four seeds: submit, step, abort, change weights; the invariants hold after each."""
    rng = random.Random(seed)
    bench = Bench(
        num_blocks=rng.choice([12, 24, 60]),
        max_num_seqs=rng.choice([3, 9, 20]),
        max_num_batched_tokens=rng.choice([8, 32, 200]),
        prefix_caching=seed != 3,
    )
    stems = [prompt_of(rng, 10) for _ in range(3)]
    aborted: set[str] = set()
    for i in range(1_250):
        match rng.choices(["add", "step", "abort", "weights"], [2, 12, 0.3, 0.15])[0]:
            case "add" if bench.scheduler.num_waiting < 30:
                prompt = [*rng.choice(stems)[: rng.randrange(1, 11)], *prompt_of(rng, rng.randrange(0, 9))]
                bench.add(f"r{i}", prompt, n=rng.choice([1, 1, 2, 4, 25]), max_tokens=rng.randrange(1, 20))
            case "abort" if bench.groups:
                name = rng.choice(list(bench.groups))
                if name in bench.scheduler:
                    aborted.add(name)
                bench.take(bench.scheduler.abort(name))
            case "weights":
                bench.take(bench.scheduler.weights_changed(rng.choice(["keep", "recompute"])))
                bench.version += 1
            case _:
                bench.step()
        bench.check()
    bench.finish(100_000)
    assert len(bench.groups) > 50
    for name in bench.groups:
        if name not in aborted:
            bench.assert_expected(name)
        for output in bench.outputs[name].values():
            assert output.weight_versions == sorted(output.weight_versions)


@pytest.mark.parametrize("max_steps", [1, 8])
def test_a_lack_of_memory_makes_batches_smaller_and_its_end_lets_them_grow(max_steps: int) -> None:
    bench = Bench(num_blocks=200, max_num_seqs=12, max_num_batched_tokens=64, max_steps=max_steps)
    rng = random.Random(12)
    bench.runner.memory_tokens = 5
    for i in range(6):
        bench.add(f"r{i}", prompt_of(rng, 19), n=2, max_tokens=12)
    bench.finish()
    counters = bench.scheduler.counters
    assert bench.runner.max_batch_tokens <= 5
    assert 4 <= counters.num_out_of_memory < counters.num_steps  # 64, 32, 16, 8 tokens, and a try now and then
    bench.runner.memory_tokens = 1 << 30
    for i in range(6, 200):
        bench.add(f"r{i}", prompt_of(rng, 19), n=2, max_tokens=12)
    bench.finish()
    assert bench.runner.max_batch_tokens > 32
    assert bench.scheduler._token_limit == 64
    for name in bench.groups:
        bench.assert_expected(name)


def test_what_has_no_memory_as_a_single_token_fails_by_name_and_the_rest_goes_on() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add("r0", prompt_of(random.Random(13), 9), n=3, max_tokens=4)
    bench.runner.memory_tokens = 0
    for _ in range(10):
        bench.step()
    failures = bench.pipeline.take_failures()
    assert {name: error.code for name, error in failures.items()} == {"r0": "OUT_OF_MEMORY"}
    assert not bench.scheduler.has_unfinished()
    bench.runner.memory_tokens = 1
    bench.add("r1", prompt_of(random.Random(14), 9), n=3, max_tokens=4)
    bench.finish()
    bench.assert_expected("r1")


def test_the_oracle_sees_a_missing_copy_on_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: without the copy, siblings write into one block."""
    monkeypatch.setattr(BlockManager, "_shared_tail", lambda self, sequence: None)
    bench = Bench()
    bench.add("r", prompt_of(random.Random(11), 6), n=4, max_tokens=8, ignore_eos=True)
    with pytest.raises(AssertionError, match="write one slot"):
        bench.finish()
