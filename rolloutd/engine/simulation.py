"""The real scheduler and block manager under load, with a runner that computes nothing: what deciding costs.

    rolloutd bench --simulate

All requests are queued at once, the worst case for the queue. The figures hold for the machine that they ran on; that
they stay level from a thousand requests to a million is what is to be seen.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rolloutd.sampling_params import SamplingParams

from .block_manager import BlockManager
from .scheduler import Scheduler
from .sequence import Batch, Group, Request, SampledTokens

NEVER_STOPS = 1
"""The token that is always sampled; completions end by their length."""


@dataclass(frozen=True, slots=True)
class Load:
    """A random workload; lengths are exponential with these means, cut at ten times the mean."""

    num_requests: int
    samples: int = 4
    mean_prompt_len: int = 24
    mean_completion_len: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    num_blocks: int = 4096
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What a simulation counted. Seconds are the process's own CPU time, which neighbours disturb less. KV waste is
    over the steps: slots allocated and not filled / slots allocated."""

    num_requests: int
    num_completions: int
    num_steps: int
    num_preemptions: int
    scheduled_tokens: int
    seconds: float
    us_per_scheduled_token: float
    us_per_step: float
    kv_waste: float
    most_overtaken: int
    """Admissions by which the unluckiest group came later than first come, first served."""
    leaked_blocks: int

    def to_dict(self) -> dict[str, float]:
        """Return the fields."""
        return asdict(self)


def simulate(load: Load) -> Report:
    """Run a workload through scheduler and block manager and return what it cost."""
    blocks = BlockManager(load.num_blocks, load.block_size)
    scheduler = Scheduler(blocks, max_num_seqs=load.max_num_seqs, max_num_batched_tokens=load.max_num_batched_tokens)
    waste = _Waste(blocks)
    num_completions, most_overtaken, seconds = 0, 0, 0.0
    live: dict[str, Group] = {}
    for group in _groups(load):
        live[group.request_id] = group
        started = time.process_time()
        scheduler.add(group)
        seconds += time.process_time() - started
    while scheduler.has_unfinished():
        started = time.process_time()
        batch = scheduler.schedule()
        seconds += time.process_time() - started
        sampled = _sample(batch)
        started = time.process_time()
        finished = scheduler.commit(batch, sampled, weight_version=0)
        seconds += time.process_time() - started
        num_completions += len(finished)
        for done in finished:
            if done.is_last:
                group = live.pop(done.request_id)
                most_overtaken = max(most_overtaken, group.ticket - group.seed)
        if scheduler.counters.num_steps % 16 == 0:
            waste.measure(scheduler)
    counters = scheduler.counters
    scheduled = counters.prefill_tokens + counters.decode_tokens
    return Report(
        num_requests=load.num_requests,
        num_completions=num_completions,
        num_steps=counters.num_steps,
        num_preemptions=counters.num_preemptions,
        scheduled_tokens=scheduled,
        seconds=seconds,
        us_per_scheduled_token=1e6 * seconds / scheduled,
        us_per_step=1e6 * seconds / counters.num_steps,
        kv_waste=waste.share,
        most_overtaken=most_overtaken,
        leaked_blocks=blocks.num_used,
    )


def _groups(load: Load) -> Iterator[Group]:
    rng = random.Random(load.seed)  # noqa: S311  (a workload, not a secret)

    def length(mean: int) -> int:
        return min(1 + int(rng.expovariate(1.0 / mean)), 10 * mean)

    for i in range(load.num_requests):
        prompt = tuple(rng.randrange(1000) for _ in range(length(load.mean_prompt_len)))
        params = SamplingParams(n=load.samples, max_tokens=length(load.mean_completion_len))
        # The seed, which nothing draws from here, is the order of arrival.
        yield Group.from_request(Request(f"r{i}", prompt, params), seed=i, eos_token_ids=frozenset())


def _sample(batch: Batch) -> SampledTokens:
    count = len(batch.draws)
    zeros = [0.0] * count
    return SampledTokens([NEVER_STOPS] * count, zeros, zeros, [[]] * len(batch.chunks))


class _Waste:
    """Slots that are allocated and hold nothing, summed over the measured steps."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._allocated = 0
        self._filled = 0

    def measure(self, scheduler: Scheduler) -> None:
        size = self._blocks.block_size
        filled: dict[int, int] = {}
        for sequence in scheduler.live_sequences():
            for i, block in enumerate(sequence.block_table):
                filled[block] = max(filled.get(block, 0), min(size, sequence.num_computed - i * size))
        self._allocated += size * len(filled)
        self._filled += sum(filled.values())

    @property
    def share(self) -> float:
        return 1.0 - self._filled / self._allocated if self._allocated else 0.0
