"""TRL's trainers with `use_rollout_server=True`: same names, same behaviour, completions from a rolloutd daemon.

    from rolloutd.integrations.trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=..., use_rollout_server=True)

`accelerate launch -m rolloutd.integrations.trl --use_rollout_server ...` runs TRL's own GRPO script with these classes.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import trl

from rolloutd.errors import ConfigError

from . import attach as attaching
from .contract import check_class
from .options import RolloutOptions, RolloutServerFields, check_args, is_enabled, warn_about_address, warn_about_unused
from .report import LogprobGap, RolloutMetrics, rollout_report
from .rollout_backend import RolloutBackend

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RolloutMetrics",
    "RolloutMixin",
    "install",
    "rollout_report",
]

log = logging.getLogger(__name__)


@dataclass
class GRPOConfig(RolloutServerFields, trl.GRPOConfig):
    """TRL's `GRPOConfig` with the fields `use_rollout_server` and `rollout_server_*`."""


@dataclass
class RLOOConfig(RolloutServerFields, trl.RLOOConfig):
    """TRL's `RLOOConfig` with the fields `use_rollout_server` and `rollout_server_*`."""


class RolloutMixin:
    """Put before a TRL trainer class: `class MyTrainer(RolloutMixin, trl.GRPOTrainer)`."""

    _rollout_seams: ClassVar[attaching.Seams] = attaching.Seams()

    def __init__(self, *args: Any, use_rollout_server: bool | None = None, **kwargs: Any) -> None:
        self._rollout_backend: RolloutBackend | None = None
        self.rollout_daemon: Any = None
        self.rollout_logprob_gap = LogprobGap()
        config = _config_of(super().__init__, args, kwargs)
        if not is_enabled(use_rollout_server, config):
            warn_about_unused(config)
            super().__init__(*args, **kwargs)
            return
        check_class(type(self))
        check_args(config, type(self).__name__)
        options = RolloutOptions.from_args(config)
        warn_about_address(options)
        self.rollout_logprob_gap.limit = options.max_logprob_gap
        with _hidden_generation_kwargs(config):
            super().__init__(*args, **kwargs)
        self._rollout_backend = attaching.attach(self, options, self._rollout_seams)

    @property
    def rollout_backend(self) -> RolloutBackend:
        """The backend; `ConfigError` where the trainer generates without a daemon."""
        if self._rollout_backend is None:
            raise ConfigError(f"{type(self).__name__} has no rollout server. Pass use_rollout_server=True.")
        return self._rollout_backend

    @property
    def rollout_client(self) -> Any:
        """This rank's `RolloutClient`."""
        return self.rollout_backend.client

    @property
    def rollout_metrics(self) -> RolloutMetrics:
        """Counters up to now, over all ranks."""
        return self.rollout_backend.metrics

    def force_sync(self) -> None:
        """Send the weights now, on all ranks together: for weights changed by hand within a step."""
        self.rollout_backend.sync_weights()
        self._last_loaded_step = self.state.global_step  # type: ignore[attr-defined]  # of the trainer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Keep the log-probability gap of the metrics before TRL clears them."""
        if self._rollout_backend is not None and self.model.training:  # type: ignore[attr-defined]  # of the trainer
            self.rollout_logprob_gap.fold(self._metrics["train"])  # type: ignore[attr-defined]  # of the trainer
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # of the trainer

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Ranks take different numbers of tool turns: they speak once, at the end."""
        if self._rollout_backend is None:
            return super()._tool_call_loop(*args, **kwargs)  # type: ignore[misc]  # of the trainer
        with self._rollout_backend.tool_loop():
            return super()._tool_call_loop(*args, **kwargs)  # type: ignore[misc]  # of the trainer


class GRPOTrainer(RolloutMixin, trl.GRPOTrainer):
    """TRL's `GRPOTrainer`; `use_rollout_server=True` generates with a rolloutd daemon."""


class RLOOTrainer(RolloutMixin, trl.RLOOTrainer):
    """TRL's `RLOOTrainer`; `use_rollout_server=True` generates with a rolloutd daemon."""


def _config_of(init: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the trainer's config from its arguments, by position or by keyword; None where there is none."""
    try:
        return inspect.signature(init).bind(*args, **kwargs).arguments.get("args")
    except TypeError:
        return kwargs.get("args")  # the trainer itself says what is wrong with its arguments


@contextmanager
def _hidden_generation_kwargs(config: Any) -> Iterator[None]:
    """Keep vLLM's names from the `GenerationConfig` that TRL builds for its own generation, which is not used."""
    kwargs = getattr(config, "generation_kwargs", None)
    if kwargs:
        config.generation_kwargs = None
    try:
        yield
    finally:
        if kwargs:
            config.generation_kwargs = kwargs


_REPLACED = {
    "GRPOConfig": ("trl", "trl.trainer", "trl.trainer.grpo_config"),
    "GRPOTrainer": ("trl", "trl.trainer", "trl.trainer.grpo_trainer"),
}


def install() -> None:
    """Put our `GRPOTrainer` and `GRPOConfig` in the place of TRL's, for scripts that import them from there."""
    for name, modules in _REPLACED.items():
        for module in modules:
            setattr(importlib.import_module(module), name, globals()[name])
    log.info("trl.GRPOTrainer and trl.GRPOConfig replaced by rolloutd's")


def main() -> None:
    """Run TRL's GRPO script with our classes, with its command line and ours."""
    install()
    script = importlib.import_module("trl.scripts.grpo")
    parsed = script.make_parser().parse_args_and_config(fail_with_unknown_args=False)
    script.main(*parsed)


if __name__ == "__main__":
    # Under `python -m` this file is a second module; the classes must be those of the first.
    importlib.import_module("rolloutd.integrations.trl").main()
