"""A client whose engine lives in this process, and small trainers on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from rolloutd import LLM
from rolloutd.integrations.attach import Seams
from rolloutd.integrations.options import RolloutOptions
from rolloutd.integrations.trl import GRPOConfig, GRPOTrainer
from rolloutd.outputs import ModelInfo, RequestOutput, WeightUpdate
from rolloutd.sampling_params import SamplingParams


@dataclass
class LLMHealth:
    """What the adapter reads of a client's health."""

    state: str
    info: ModelInfo
    weight_version: int


class InProcessClient:
    """Answers as a `RolloutClient` does, and remembers what it was asked."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.calls: list[tuple[list[list[int]], list[SamplingParams]]] = []
        self.updates: list[tuple[str, WeightUpdate]] = []
        self.deltas: list[bool] = []
        """Of each full update: whether what changed was asked for. Within a process nothing travels anyway."""
        self.error: Exception | None = None
        self.closed = False

    def generate(self, prompts: Any, sampling_params: Any, *, min_version: int = 0) -> list[RequestOutput]:
        if self.error is not None:
            raise self.error
        self.calls.append((prompts, sampling_params))
        return self.llm.generate(prompts, sampling_params, min_version=min_version)

    def update_weights(self, named_tensors: Any, version: int | None = None, *, delta: bool = False) -> WeightUpdate:
        self.deltas.append(delta)
        update = self.llm.update_weights(named_tensors, version)
        self.updates.append(("full", update))
        return update

    def update_lora(
        self, named_tensors: Any, peft_config: Any, version: int | None = None, **options: Any
    ) -> WeightUpdate:
        update = self.llm.update_lora(named_tensors, peft_config, version, **options)
        self.updates.append(("lora", update))
        return update

    def adopt(self, module: Any) -> WeightUpdate:
        update = self.llm.adopt(module)
        self.updates.append(("adopted", update))
        return update

    def wait_ready(self, timeout: float | None = None) -> ModelInfo:
        return self.llm.info

    def health(self) -> LLMHealth:
        return LLMHealth("ready", self.llm.info, self.llm.weight_version)

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeDaemon:
    """Stands for a daemon process; its address is the model that it would serve."""

    address: str
    engine_options: Mapping[str, Any]
    server_options: Mapping[str, Any]
    pid: int = 0
    log_path: str = "daemon.log"
    stopped: list[float] = field(default_factory=list)

    def stop(self, grace_s: float) -> None:
        self.stopped.append(grace_s)


DAEMONS: list[FakeDaemon] = []
"""Every fake daemon that was started, in order."""


def start_fake_daemon(engine: Mapping[str, Any], server: Mapping[str, Any], timeout_s: float) -> FakeDaemon:
    DAEMONS.append(FakeDaemon(engine["model"], engine, server))
    return DAEMONS[-1]


def connect_in_process(address: str, options: RolloutOptions) -> InProcessClient:
    return InProcessClient(
        LLM(address, max_model_len=options.max_model_len or 256, numerics="fp32", kv_cache_bytes=8 << 20)
    )


SEAMS = Seams(connect=connect_in_process, start_daemon=start_fake_daemon)


class InProcessGRPOTrainer(GRPOTrainer):
    """Our trainer, with the engine in this process."""

    _rollout_seams = SEAMS


def prompts(count: int = 8) -> Dataset:
    return Dataset.from_dict({"prompt": [f"What is {i} + {i + 3}?" for i in range(count)]})


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Differs between the completions of a group, so that training moves."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def config(tmp_path: Path, **options: Any) -> GRPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return GRPOConfig(**{**defaults, **options})


def trainer(model: Any, args: GRPOConfig, cls: type[Any] = InProcessGRPOTrainer, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "model": model if not isinstance(model, Path) else str(model),
        "reward_funcs": reward,
        "args": args,
        "train_dataset": prompts(),
        "use_rollout_server": True,
    }
    return cls(**{**defaults, **options})
