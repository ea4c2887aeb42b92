"""`deterministic=True`: a request has the same bits whatever runs beside it, however it is cut and recomputed."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rolloutd import LLM, SamplingParams
from rolloutd.config import EngineConfig
from rolloutd.engine.block_manager import BlockManager
from rolloutd.engine.scheduler import Scheduler
from rolloutd.engine.sequence import Group, Request
from rolloutd.models.registry import load_model
from rolloutd.runtime.model_runner import ModelRunner, resolve_precision
from rolloutd.weights.loader import Checkpoint

Factory = Callable[..., Path]
Bits = tuple[tuple[int, ...], tuple[float, ...]]
"""Tokens and log-probabilities of one sample; floats compare exactly."""

BLOCK_SIZE = 4
LONGEST = 24 + 14
NUM_CASES = 500


@dataclass(frozen=True)
class Case:
    """A batch of requests and the circumstances it runs in."""

    requests: tuple[int, ...]
    """Numbers of requests in `Machine.requests`, in the order of arrival."""
    spare_blocks: int
    """Blocks beyond what the longest request needs; few make for preemptions."""
    budget: int
    seats: int
    caching: bool
    warm: bool
    """The prefix cache has seen the prompts before."""


CASES = st.builds(
    Case,
    requests=st.lists(st.integers(0, 19), min_size=2, max_size=7, unique=True).map(tuple),
    spare_blocks=st.sampled_from([0, 1, 100]),
    budget=st.sampled_from([5, 24, 512]),
    seats=st.sampled_from([3, 16]),
    caching=st.booleans(),
    warm=st.booleans(),
)


class Machine:
    """One set of weights, run by a new scheduler and pool for each case."""

    def __init__(self, folder: Path, *, deterministic: bool, numerics: str = "fp32") -> None:
        config = EngineConfig.from_dict(
            {"model": str(folder), "deterministic": deterministic, "numerics": numerics, "device": "cpu"}
        )
        checkpoint, device = Checkpoint(folder), torch.device("cpu")
        precision = resolve_precision(config, "float32", device)
        loaded = load_model(config, checkpoint, checkpoint.hf_config(), precision, device)
        self.runner = ModelRunner(loaded.model, loaded.weights, precision, device)
        rng = random.Random(0)
        stems = [[rng.randrange(512) for _ in range(30)] for _ in range(3)]
        self.requests = []
        for i in range(20):
            tail = [rng.randrange(512) for _ in range(rng.randrange(1, 9))]
            prompt = [*rng.choice(stems)[: rng.randrange(17)], *tail]
            params = SamplingParams(n=rng.choice([1, 1, 2]), max_tokens=rng.randrange(1, 15), ignore_eos=True)
            self.requests.append(Request(f"r{i}", tuple(prompt), params))
        self.num_preemptions = 0
        alone = Case((), spare_blocks=100, budget=512, seats=16, caching=False, warm=False)
        self.alone = {i: self.run(replace(alone, requests=(i,)))[i] for i in range(20)}

    def run(self, case: Case) -> dict[int, list[Bits]]:
        """Return the samples of each request."""
        num_blocks = -(-LONGEST // BLOCK_SIZE) + case.spare_blocks
        scheduler = Scheduler(
            BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=case.caching),
            max_num_seqs=case.seats,
            max_num_batched_tokens=case.budget,
        )
        self.runner.allocate_cache(num_blocks, BLOCK_SIZE)
        for _ in range(1 + case.warm):
            samples = self._run_all(scheduler, case.requests)
        self.num_preemptions += scheduler.counters.num_preemptions
        assert scheduler.blocks.num_used == 0, "a block leaked"
        return samples

    def _run_all(self, scheduler: Scheduler, numbers: tuple[int, ...]) -> dict[int, list[Bits]]:
        for i in numbers:
            scheduler.add(Group.from_request(self.requests[i], seed=i, eos_token_ids=frozenset()))
        samples: dict[int, dict[int, Bits]] = {i: {} for i in numbers}
        while scheduler.has_unfinished():
            batch = scheduler.schedule()
            for done in scheduler.commit(batch, self.runner.run(batch), weight_version=0):
                bits = tuple(done.completion.token_ids), tuple(done.completion.logprobs)
                samples[int(done.request_id[1:])][done.completion.index] = bits
        return {i: [found[index] for index in sorted(found)] for i, found in samples.items()}

    def differs(self, case: Case) -> bool:
        """Return whether a request's bits are not those it has alone."""
        return any(bits != self.alone[i] for i, bits in self.run(case).items())


@pytest.fixture(scope="module")
def folder(tiny_model: Factory) -> Path:
    return tiny_model("qwen2", hidden=32, head_dim=8, max_len=128)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("num_threads", "num_cases"), [(1, NUM_CASES), (2, 15)])
def test_bits_do_not_depend_on_the_batch(num_threads: int, num_cases: int, folder: Path) -> None:
    """500 cases of company x preemption x chunks x state of the prefix cache, and some more on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        machine = Machine(folder, deterministic=True)
        count = 0

        @settings(max_examples=num_cases, deadline=None, derandomize=True, database=None)
        @given(CASES)
        def run(case: Case) -> None:
            nonlocal count
            assert not machine.differs(case)
            count += 1

        run()
    finally:
        torch.set_num_threads(before)
    print(f"{count} cases, {machine.num_preemptions} preemptions")
    assert count >= num_cases
    assert machine.num_preemptions > num_cases / 5


def test_without_it_some_bits_do(folder: Path) -> None:
    """The same cases; were none to differ, the test above would show nothing."""
    machine = Machine(folder, deterministic=False)
    found: list[Case] = []

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(CASES)
    def run(case: Case) -> None:
        if not found and machine.differs(case):
            found.append(case)

    run()
    assert found


@pytest.mark.parametrize("numerics", ["bf16", "autocast"])
def test_bits_do_not_depend_on_the_batch_in_reduced_precision(numerics: str, folder: Path) -> None:
    machine = Machine(folder, deterministic=True, numerics=numerics)

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(CASES)
    def run(case: Case) -> None:
        assert not machine.differs(case)

    run()


def test_bits_do_not_depend_on_the_batch_with_an_adapter(folder: Path) -> None:
    """Rank 3: products of three columns, where the kernels of small matrices differ most."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for name, num_out in (("q_proj", 32), ("v_proj", 16)):
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.default.weight"] = torch.randn(3, 32, generator=generator)
            tensors[f"{path}.lora_B.default.weight"] = torch.randn(num_out, 3, generator=generator)
    prompts = [[i, *range(i)] for i in range(1, 9)]
    params = SamplingParams(seed=5, max_tokens=9, ignore_eos=True)
    with LLM(str(folder), deterministic=True, max_model_len=128) as llm:
        llm.update_lora(tensors.items(), {"r": 3, "lora_alpha": 3})
        together = llm.generate(prompts, params)
        alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    assert [o.outputs[0].logprobs for o in together] == [o.outputs[0].logprobs for o in alone]


SCRIPT = """
import sys
from rolloutd import LLM, SamplingParams
with LLM(sys.argv[1], deterministic=True, kv_cache_bytes=1 << 20, max_model_len=128) as llm:
    for output in llm.generate([[i, 7, 9] for i in range(int(sys.argv[2]))], SamplingParams(seed=5, max_tokens=20)):
        print(output.outputs[0].token_ids, [value.hex() for value in output.outputs[0].logprobs])
"""


def test_another_process_gives_the_same_bits(folder: Path, root: Path) -> None:
    """Five prompts there, each of them alone here."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), "5"], cwd=root, capture_output=True, text=True, check=True
    )
    lines = []
    with LLM(str(folder), deterministic=True, max_model_len=128) as llm:
        for i in range(5):
            completion = llm.generate([[i, 7, 9]], SamplingParams(seed=5, max_tokens=20))[0].outputs[0]
            lines.append(f"{completion.token_ids} {[value.hex() for value in completion.logprobs]}")
    assert done.stdout.splitlines() == lines


def test_a_pool_of_little_more_than_one_request_serves_64(folder: Path) -> None:
    """1.25 times the longest request: all finish, with the bits of an unlimited pool, and no block is left behind."""
    rng = random.Random(1)
    prompts = [[rng.randrange(512) for _ in range(rng.randrange(1, 60))] for _ in range(64)]
    params = [SamplingParams(max_tokens=rng.randrange(1, 40), seed=i, ignore_eos=True) for i in range(64)]
    longest = max(len(prompt) + one.max_tokens for prompt, one in zip(prompts, params, strict=True))
    block_bytes = 2 * 2 * 16 * 2 * 8 * 4  # keys and values, layers, tokens, heads, head_dim, fp32
    results = []
    for num_blocks in (4096, int(1.25 * -(-longest // 16))):
        options = {"max_model_len": longest, "kv_cache_bytes": num_blocks * block_bytes, "max_num_seqs": 64}
        with LLM(str(folder), deterministic=True, **options) as llm:
            outputs = llm.generate(prompts, params)
            results.append([(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs])
            stats = llm.stats()
            llm.engine.check_invariants()
            assert stats.blocks_used == 0
    assert stats.blocks_total == int(1.25 * -(-longest // 16))
    print(f"{stats.blocks_total} blocks, {stats.num_preemptions} preemptions")
    assert results[0] == results[1]
    assert stats.num_preemptions > 0
