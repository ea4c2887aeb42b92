"""What a run's rollouts cost and how close they were: counters, `rollout/*` metrics, a table at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from rolloutd.errors import ParityMismatch

_DIFFERENCE = "sampling/sampling_logp_difference"


@dataclass(frozen=True, slots=True)
class RolloutMetrics:
    """Counters of one run up to now, over all ranks."""

    num_syncs: int = 0
    sync_bytes: int = 0
    """Bytes of weights that travelled, all syncs together."""
    sync_seconds: float = 0.0
    """Seconds in which training waited for syncs."""
    generated_tokens: int = 0
    generate_seconds: float = 0.0
    """Seconds in which training waited for completions, of the slowest rank."""
    num_generate_calls: int = 0
    weight_version: int = 0
    """The version that serves."""
    base_sync_bytes: int = 0
    """Bytes of base weights sent before the first adapter, where the daemon held others. Not in `sync_bytes`."""

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens per second of waiting, 0 before the first."""
        return self.generated_tokens / self.generate_seconds if self.generate_seconds else 0.0


class LogprobGap:
    """Mean and maximum of |trainer's - daemon's log-probability|, folded from what TRL measures per batch."""

    def __init__(self) -> None:
        self.limit: float | None = None
        self._means: list[float] = []
        self.max = 0.0

    def fold(self, metrics: dict[str, list[float]]) -> None:
        """Take in the metrics gathered since the last log line; TRL clears them after it.

        `ParityMismatch` where a batch's mean is above `limit`; ranks have the same means, and raise together.
        """
        means = metrics.get(f"{_DIFFERENCE}/mean", [])
        self._means += means
        self.max = max([self.max, *metrics.get(f"{_DIFFERENCE}/max", [])])
        above = [mean for mean in means if self.limit is not None and not mean <= self.limit]
        if above:
            raise ParityMismatch(
                f"the mean |log-probability gap| of a batch is {above[0]:.3g} nats, rollout_server_max_logprob_gap is "
                f"{self.limit:g}. Compare numerics and adapter of trainer and daemon, or raise the limit."
            )

    @property
    def mean(self) -> float | None:
        """Mean over batches; None where the trainer does not measure it."""
        return sum(self._means) / len(self._means) if self._means else None


def rollout_report(trainer: Any) -> str:
    """Return a table of what the rollouts of a run cost and how close they came to the trainer's numbers."""
    metrics, gap = trainer.rollout_metrics, trainer.rollout_logprob_gap
    per_sync = max(metrics.num_syncs, 1)
    rows = [
        ("tokens generated", f"{metrics.generated_tokens:,}"),
        ("rollout tokens/s", f"{metrics.tokens_per_second:,.0f}"),
        ("weight syncs", f"{metrics.num_syncs} (version {metrics.weight_version})"),
        ("seconds per sync", f"{metrics.sync_seconds / per_sync:.3f}"),
        ("bytes per sync", f"{metrics.sync_bytes / per_sync:,.0f}"),
    ]
    if gap.mean is not None:
        rows += [("|logprob gap| mean", f"{gap.mean:.2e}"), ("|logprob gap| max", f"{gap.max:.2e}")]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join(["rollout server", *lines])


class ReportCallback(TrainerCallback):
    """Prints the table when training ends, on rank 0."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        if trainer is not None and state.is_world_process_zero:
            print(rollout_report(trainer), flush=True)
