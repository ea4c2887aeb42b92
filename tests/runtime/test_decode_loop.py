"""The decode loop on a CPU, with real tiny models: the same completions as step by step, whatever ends on the way."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rolloutd.engine.sequence import Batch, Chunk, Draw, Group, Request, Sequence
from rolloutd.errors import EngineStalled
from rolloutd.kernels.draw import draw_tokens_reference
from rolloutd.runtime import decode_loop
from rolloutd.runtime.decode_loop import DecodeLoop, bucket_for
from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.loop_rows import LoopSizes
from rolloutd.runtime.step_graphs import CudaCapture, Step, StepGraphs
from rolloutd.runtime.transfers import CpuTransfers, Event, Transfers
from rolloutd.sampling_params import SamplingParams
from tests.runtime.loop_bench import CPU, Bench, ReplayingCapture, assert_same

TinyModel = Callable[..., Path]

GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8}
CUT = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01}


def traffic(bench: Bench, seed: int, num_requests: int, kinds: list[dict[str, Any]]) -> None:
    """Send random requests, some while others run."""
    rng = random.Random(seed)
    for i in range(num_requests):
        prompt = [rng.randrange(300) for _ in range(rng.choice([1, 3, 8, 21]))]
        n, max_tokens = rng.choice([1, 1, 3]), rng.choice([1, 2, 5, 9, 17, 40])
        stops = [rng.randrange(512) for _ in range(rng.choice([0, 3, 8]))]
        params = dict(rng.choice(kinds), n=n, max_tokens=max_tokens, stop_token_ids=stops, seed=rng.getrandbits(64))
        bench.add(f"r{i}", prompt, ignore_eos=len(stops) > 3, **params)
        for _ in range(rng.choice([0, 0, 1, 2])):
            bench.step()
    bench.finish()


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "qwen3_moe"])
def test_random_traffic_gives_the_plain_runners_completions(tiny_model: TinyModel, kind: str) -> None:
    capture = ReplayingCapture()
    plain = Bench(tiny_model(kind, extra_eos=4), loop=False)
    loop = Bench(tiny_model(kind, extra_eos=4), loop=True, capture=capture)
    for bench in (plain, loop):
        traffic(bench, 3, 24, [GREEDY, SAMPLED, CUT])
    assert_same(loop, plain)
    assert {output.finish_reason for output in plain.outputs.values()} == {"stop", "length"}
    assert capture.num_replayed > 40
    assert 2 < capture.num_captured < 12


@pytest.mark.parametrize("kinds", [[GREEDY], [SAMPLED], [CUT]])
@pytest.mark.parametrize("max_steps", [2, 5, 16])
def test_runs_of_any_length_in_a_small_pool(tiny_model: TinyModel, kinds: list[dict[str, Any]], max_steps: int) -> None:
    options = {"kv_cache_bytes": 80 * 4 * 2 * 2 * 2 * 16 * 4, "max_num_seqs": 9}  # 80 blocks: sequences are preempted
    model = tiny_model("llama", extra_eos=4)
    plain, loop = Bench(model, loop=False, **options), Bench(model, loop=True, max_steps=max_steps, **options)
    for bench in (plain, loop):
        traffic(bench, max_steps, 14, kinds)
    assert_same(loop, plain)


@pytest.mark.parametrize("options", [{"deterministic": True}, {"model_impl": "transformers"}])
def test_other_ops_and_transformers_own_code_run_in_the_loop(tiny_model: TinyModel, options: dict[str, Any]) -> None:
    model = tiny_model(extra_eos=4)
    plain, loop = Bench(model, loop=False, **options), Bench(model, loop=True, **options)
    for bench in (plain, loop):
        traffic(bench, 11, 16, [GREEDY, SAMPLED, CUT])
    assert_same(loop, plain)


def test_long_sequences_outgrow_narrow_tables(tiny_model: TinyModel) -> None:
    capture = ReplayingCapture()
    options = {"block_size": 1, "max_model_len": 200}  # tables of 64, 128 and 200 blocks
    plain = Bench(tiny_model(), loop=False, **options)
    loop = Bench(tiny_model(), loop=True, capture=capture, **options)
    for bench in (plain, loop):
        for i in range(3):
            bench.add(f"r{i}", [5 + i] * (3 + 20 * i), max_tokens=(150, 130, 40)[i], ignore_eos=True, seed=i)
        bench.finish()
    assert_same(loop, plain)
    assert {key[1] for key in loop.runner._graphs._replays} == {64, 128, 200}


def test_an_abort_between_runs_leaves_the_others_as_they_are(tiny_model: TinyModel) -> None:
    plain, loop = Bench(tiny_model(), loop=False), Bench(tiny_model(), loop=True)
    for bench in (plain, loop):
        for i in range(5):
            bench.add(f"r{i}", [1, 2, 3 + i], max_tokens=60, ignore_eos=True, seed=i)
        for _ in range(3):
            bench.step()
        bench.engine.abort("r1")
        bench.add("late", [9, 9], max_tokens=50, ignore_eos=True, seed=77)
        bench.finish()
    assert_same(loop, plain)


@pytest.mark.gpu
def test_graphs_give_what_eager_steps_give_and_all_steps_are_captured(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    model, device = tiny_model(head_dim=64, extra_eos=4), torch.device("cuda")
    eager = Bench(model, loop=True, device="cuda")
    graphs = Bench(model, loop=True, device="cuda", capture=CudaCapture(device))
    with caplog.at_level(logging.WARNING, logger="rolloutd.runtime.step_graphs"):
        for bench in (eager, graphs):
            traffic(bench, 7, 24, [GREEDY, SAMPLED, CUT])
    assert_same(graphs, eager)
    assert not caplog.records
    assert len(graphs.runner._graphs) > 2


# ------------------------------------------------------------------------------------------------ captures that fail


class FailingCapture(ReplayingCapture):
    """Captures as many steps as it is told, then fails half way through one."""

    def __init__(self, num_good: int) -> None:
        super().__init__()
        self._num_good = num_good

    def __call__(self, step: Step) -> Step:
        if self.num_captured == self._num_good:
            try:
                step()
                raise RuntimeError("operation not permitted when stream is capturing\nand much more")
            finally:
                raise RuntimeError("capture failed because of a previous error")
        return super().__call__(step)


@pytest.mark.parametrize("num_good", [0, 1])
def test_a_failed_capture_means_eager_steps_and_one_warning_with_the_reason(
    tiny_model: TinyModel, num_good: int, caplog: pytest.LogCaptureFixture
) -> None:
    capture = FailingCapture(num_good)
    plain = Bench(tiny_model(extra_eos=4), loop=False)
    loop = Bench(tiny_model(extra_eos=4), loop=True, capture=capture)
    with caplog.at_level(logging.WARNING, logger="rolloutd.runtime.step_graphs"):
        for bench in (plain, loop):
            traffic(bench, 5, 12, [SAMPLED, CUT])
    assert_same(loop, plain)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "RuntimeError: operation not permitted when stream is capturing (at __call__" in message
    assert "much more" not in message
    assert capture.num_captured == num_good


def test_an_error_of_the_step_itself_is_not_hidden_by_the_fallback() -> None:
    graphs = StepGraphs(ReplayingCapture())

    def broken() -> None:
        raise RuntimeError("shapes do not fit")

    step = graphs.replay_of("key", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        step()


# ------------------------------------------------------------------------------------------ the loop without a model


VOCAB = 50


def next_token(token: int, position: int) -> int:
    return (7 * token + 3 * position + 1) % VOCAB


class CountingModel:
    """Logits that point at `next_token`; it notes what it was given."""

    def __init__(self) -> None:
        self.inputs: list[dict[str, list[Any]]] = []

    def __call__(self, inputs: ForwardInputs) -> Tensor:
        names = ("token_ids_T", "positions_T", "slot_mapping_T", "decode_lens_R", "decode_block_tables_RM")
        self.inputs.append({name: getattr(inputs, name).tolist() for name in names})
        wanted = (7 * inputs.token_ids_T + 3 * inputs.positions_T + 1) % VOCAB
        return torch.nn.functional.one_hot(wanted, VOCAB).float() * 9.0


SIZES = LoopSizes(max_num_seqs=6, max_model_len=64, max_steps=4, block_size=4, scratch_block=500, vocab_size=VOCAB)


def loop_of(model: CountingModel, transfers: Transfers | None = None, sizes: LoopSizes = SIZES) -> DecodeLoop:
    return DecodeLoop(model, draw_tokens_reference, sizes, CPU, transfers or CpuTransfers(), StepGraphs(None))


def sequence_of(tokens: list[int], first_block: int, **params: Any) -> Sequence:
    """Return a sequence whose last token is pending, with its own blocks for all that may come."""
    options = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True} | params
    group = Group.from_request(
        Request("r", tuple(tokens[:-1]), SamplingParams(**options)), seed=1, eos_token_ids=frozenset()
    )
    sequence = group.spawn()
    sequence.token_ids = list(tokens)
    sequence.num_computed = len(tokens) - 1
    sequence.block_table = list(range(first_block, first_block + 16))
    return sequence


def run_of(sequences: list[Sequence], starts: list[int], num_steps: int, *, continues: bool = False) -> Batch:
    chunks = tuple(Chunk(sequence, start, 1) for sequence, start in zip(sequences, starts, strict=True))
    draws = tuple(Draw(sequence, i) for i, sequence in enumerate(sequences))
    return Batch(chunks, draws, (), num_steps, continues)


def expected(token: int, position: int, count: int) -> list[int]:
    tokens: list[int] = []
    for at in range(position, position + count):
        token = next_token(token, at)
        tokens.append(token)
    return tokens


def test_rows_that_end_are_cut_compute_nothing_and_come_back_empty() -> None:
    model = CountingModel()
    loop = loop_of(model)
    stop = expected(3, 2, 3)[1]
    a = sequence_of([1, 2, 3], 100, stop_token_ids=[stop, 49])  # ends with its 2nd new token
    b = sequence_of([1, 1, 1, 4], 200)
    c = sequence_of([7, 8], 300, max_tokens=5)  # has one of five: ends with its 4th new one
    d = sequence_of([9] * 62, 400, max_tokens=400)  # the model's own limit of 64 tokens
    first = loop.launch(run_of([a, b, c, d], [2, 3, 1, 61], 4))
    second = loop.launch(run_of([c, b, a], [5, 7, 6], 3, continues=True))
    answer = first.result()
    assert answer.token_ids == [expected(3, 2, 2), expected(4, 3, 4), expected(8, 1, 4), expected(9, 61, 2)]
    assert [len(row) for row in answer.logprobs] == [len(row) for row in answer.sampling_logprobs] == [2, 4, 4, 2]
    assert all(value == 0.0 for row in answer.sampling_logprobs for value in row)
    assert all(-0.1 < value < 0.0 for row in answer.logprobs for value in row)
    last = answer.token_ids[1][-1]
    assert second.result().token_ids == [[], expected(last, 7, 3), []]
    assert first.result() is answer
    at_third = model.inputs[2]
    assert at_third["decode_lens_R"] == [0, 6, 4, 0]
    assert at_third["slot_mapping_T"] == [2000, 201 * 4 + 1, 300 * 4 + 3, 2000]
    assert at_third["token_ids_T"][0] == at_third["token_ids_T"][3] == at_third["positions_T"][0] == 0


def test_padding_rows_are_rows_that_have_ended() -> None:
    model = CountingModel()
    loop = loop_of(model)
    sequences = [sequence_of([1, 2, 3 + i], 20 * i) for i in range(5)]
    handle = loop.launch(run_of(sequences, [2] * 5, 2))
    assert handle.result().token_ids == [expected(3 + i, 2, 2) for i in range(5)]
    for inputs in model.inputs:
        assert len(inputs["token_ids_T"]) == bucket_for(5) == 8
        assert inputs["decode_lens_R"][5:] == [0, 0, 0]
        assert inputs["slot_mapping_T"][5:] == [2000, 2000, 2000]


def test_a_continued_run_sends_only_blocks_that_were_appended() -> None:
    model = CountingModel()
    loop = loop_of(model)
    a, b = sequence_of([1, 2, 3], 100), sequence_of([4, 5], 200)
    a.block_table, b.block_table = [31, 30], [21, 20]
    loop.launch(run_of([a, b], [2, 1], 4)).result()
    assert model.inputs[-1]["decode_block_tables_RM"][0][:2] == [31, 30]
    a.block_table += [17, 16]
    a.block_table[0] = 99  # is on the device and not sent again
    loop.launch(run_of([b, a], [5, 6], 4, continues=True)).result()
    tables = model.inputs[-1]["decode_block_tables_RM"]
    assert tables[0][:2] == [21, 20]
    assert tables[1][:4] == [31, 30, 17, 16]
    assert [row[0] // 4 for row in (model.inputs[5]["slot_mapping_T"], model.inputs[6]["slot_mapping_T"])] == [20, 20]
    a.token_ids += [0] * 8
    loop.launch(run_of([a], [10], 4)).result()  # a run by itself sends all
    assert model.inputs[-1]["decode_block_tables_RM"][0][:4] == [99, 30, 17, 16]


def test_a_third_run_is_not_launched_before_the_first_is_read() -> None:
    loop = loop_of(CountingModel())
    sequences = [sequence_of([1, 2], 100)]
    first = loop.launch(run_of(sequences, [1], 2))
    second = loop.launch(run_of(sequences, [3], 2, continues=True))
    with pytest.raises(AssertionError, match="the first was not read"):
        loop.launch(run_of(sequences, [5], 2, continues=True))
    first.result()
    del second  # after an error nobody reads it
    handles = [loop.launch(run_of(sequences, [5 + 2 * i], 2, continues=True)) for i in range(2)]
    tokens = expected(2, 1, 8)
    assert [handle.result().token_ids for handle in handles] == [[tokens[4:6]], [tokens[6:]]]


class HangingTransfers(CpuTransfers):
    def fetch(self, source: Tensor, target: Tensor) -> Event:
        return self

    def query(self) -> bool:
        return False


def test_an_answer_that_never_comes_is_an_error_with_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "DEADLINE_S", 0.01)
    handle = loop_of(CountingModel(), HangingTransfers()).launch(run_of([sequence_of([1, 2], 100)], [1], 2))
    with pytest.raises(EngineStalled, match=r"a run of decode steps did not end within 0\.01 s"):
        handle.result()


def walk(token: int, position: int, stops: list[int], limit: int) -> Iterator[int]:
    """Yield a row's tokens up to the one that ends it."""
    for at in range(position, limit - 1):
        token = next_token(token, at)
        yield token
        if token in stops:
            return


def test_random_runs_equal_a_walk_in_plain_python() -> None:
    rng = random.Random(2)
    for _ in range(40):
        loop = loop_of(CountingModel())
        sequences, walks = [], []
        for i in range(rng.randrange(1, 7)):
            tokens = [rng.randrange(VOCAB) for _ in range(rng.randrange(2, 30))]
            stops = rng.sample(range(VOCAB), rng.randrange(9))
            max_tokens = rng.randrange(2, 30)
            sequences.append(sequence_of(tokens, 16 * i, stop_token_ids=stops, max_tokens=max_tokens))
            walks.append(walk(tokens[-1], len(tokens) - 1, stops, min(64, len(tokens) - 1 + max_tokens)))
        taking_part = list(range(len(sequences)))
        starts = [len(sequence.token_ids) - 1 for sequence in sequences]
        for turn in range(5):
            num_steps = rng.randrange(2, 5)
            some, at = [sequences[i] for i in taking_part], [starts[i] for i in taking_part]
            answer = loop.launch(run_of(some, at, num_steps, continues=turn > 0)).result()
            assert answer.token_ids == [list(islice(walks[i], num_steps)) for i in taking_part]
            for i in taking_part:
                starts[i] += num_steps
            rng.shuffle(taking_part)
            taking_part = taking_part[: rng.randrange(1, len(taking_part) + 1)]


def test_buckets() -> None:
    assert [bucket_for(n) for n in (1, 2, 3, 5, 9, 17, 33, 193, 256, 257, 1000)] == [
        *(1, 2, 4, 8, 16, 24, 48, 256, 256, 384, 1024),
    ]
