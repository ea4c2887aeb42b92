"""What is generated: prompts, samples of each, and how long their completions are."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from rolloutd.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`samples` completions of each of several prompts; end-of-sequence is ignored."""

    name: str
    samples: int
    prompt_len: int
    new_tokens: tuple[int, ...]
    """Of the completions of each prompt."""
    max_num_seqs: int | None = None
    """Sequences that run at once; the others follow as these end. None: all of them."""

    @property
    def num_prompts(self) -> int:
        return len(self.new_tokens)

    @property
    def num_sequences(self) -> int:
        return self.num_prompts * self.samples

    @property
    def batch(self) -> int:
        """Sequences at once."""
        return self.max_num_seqs or self.num_sequences

    @property
    def num_tokens(self) -> int:
        """Tokens that are generated."""
        return self.samples * sum(self.new_tokens)

    @property
    def max_len(self) -> int:
        return self.prompt_len + max(self.new_tokens)

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Return fresh random prompts, so that no run profits from an earlier one's prefix cache."""
        rng = random.Random(f"{self.name} {seed}")
        return [[rng.randrange(vocab_size) for _ in range(self.prompt_len)] for _ in range(self.num_prompts)]


def lognormal_lengths(count: int, median: float, cap: int, *, sigma: float = 0.8, seed: int = 0) -> tuple[int, ...]:
    """Return lengths as reasoning models have them: most are short, a few are many times longer."""
    rng = random.Random(seed)
    return tuple(min(cap, max(1, round(median * math.exp(rng.gauss(0.0, sigma))))) for _ in range(count))


def _uniform_lengths(count: int, low: int, high: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randint(low, high) for _ in range(count))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="W1", samples=8, prompt_len=128, new_tokens=(128,) * 8),
        Workload(name="W2", samples=16, prompt_len=512, new_tokens=(64,) * 4),
        Workload(name="W3", samples=8, prompt_len=64, new_tokens=_uniform_lengths(16, 8, 128)),
        Workload(name="W4", samples=8, prompt_len=64, new_tokens=lognormal_lengths(24, 40, 256), max_num_seqs=64),
    )
}


def workload_named(name: str) -> Workload:
    """Return a workload; `ConfigError` with the nearest name."""
    if name not in WORKLOADS:
        nearest = did_you_mean(name, WORKLOADS)
        raise ConfigError(f"--workloads={name!r} is not known.{nearest} Known: {', '.join(WORKLOADS)}.")
    return WORKLOADS[name]


def grid_workload(batch: int, prompt_len: int, new_tokens: int, samples: int, lengths: str) -> Workload:
    """Return a workload that keeps `batch` sequences busy."""
    if batch % samples:
        raise ConfigError(f"--batch={batch} is no multiple of --samples={samples}. Groups are seated whole.")
    count = batch // samples
    if lengths == "equal":
        chosen: tuple[int, ...] = (new_tokens,) * count
    else:
        chosen = lognormal_lengths(count, new_tokens, 8 * new_tokens)
    name = f"B{batch} p{prompt_len} n{new_tokens}{'' if lengths == 'equal' else ' lognormal'}"
    return Workload(name=name, samples=samples, prompt_len=prompt_len, new_tokens=chosen)
