"""A few tokens with the trainer's own log-probabilities: what was pushed must compute what the trainer computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ConfigError, ParityMismatch


@dataclass(frozen=True, slots=True)
class ParityProbe:
    """Prompts and completions as token ids, and the trainer's log p of each completion token, in nats.

    An update that carries one is scored as soon as it serves, and raises `ParityMismatch` where the mean of
    |log p - the trainer's log p| is above `max_mean`. Raises `ConfigError` for log-probabilities that are not one for
    each token.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    temperature: float = 1.0
    """Of the softmax that gave `logprobs`."""
    max_mean: float = 0.05
    """In nats. Rounding in bf16 gives up to 0.02; other weights, or other tokens, give tenths and more."""

    def __post_init__(self) -> None:
        lengths = [len(row) for row in self.completions], [len(row) for row in self.logprobs]
        if lengths[0] != lengths[1] or len(self.prompts) != len(self.completions) or not sum(lengths[0]):
            raise ConfigError(
                f"a probe of {len(self.prompts)} prompts, {sum(lengths[0])} tokens of {len(lengths[0])} completions "
                f"and {sum(lengths[1])} logprobs of {len(lengths[1])}. Pass a log-probability for each completion "
                "token, one completion for each prompt, and at least one token."
            )
        if not all(math.isfinite(value) for row in self.logprobs for value in row) or not self.max_mean >= 0.0:
            raise ConfigError("a probe with a log-probability, or a max_mean, that is no finite number. Pass floats.")

    def check(self, found: Sequence[Sequence[float]], version: int) -> float:
        """Return the mean |difference| of what version `version` scored, in nats; `ParityMismatch` above `max_mean`."""
        gaps = [
            (abs(a - b) if math.isfinite(a) else math.inf, i, j)
            for i, (ours, theirs) in enumerate(zip(found, self.logprobs, strict=True))
            for j, (a, b) in enumerate(zip(ours, theirs, strict=True))
        ]
        mean = sum(gap for gap, _, _ in gaps) / len(gaps)
        if not mean <= self.max_mean:
            gap, i, j = max(gaps)
            raise ParityMismatch(
                f"version {version} serves and does not compute what the trainer computes: mean |log p difference| "
                f"{mean:.3g} nats over {len(gaps)} tokens, the largest {gap:.3g} (token {j} of completion {i}: "
                f"{found[i][j]:.4g} here, {self.logprobs[i][j]:.4g} there); max_mean is {self.max_mean:g}. Compare "
                "model, numerics and adapter of both sides: `rolloutd check` does."
            )
        return mean
