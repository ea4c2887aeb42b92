"""One of two ranks that train a policy which DeepSpeed has split; started by test_two_processes.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from rolloutd.integrations.trl import GRPOTrainer
from rolloutd.weights.names import canonical_name
from tests.digests import digest_of_state
from tests.integrations.in_process import config, trainer

ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def whole(model: Any, *, lora: bool) -> dict[str, Tensor]:
    """Return copies of the full parameters that are trained, by name."""
    named = {name: parameter for name, parameter in model.named_parameters() if not lora or ".lora_" in name}
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {canonical_name(name): parameter.detach().clone() for name, parameter in named.items()}


class FirstDigest(TrainerCallback):
    """What the daemon served in the first step."""

    def __init__(self, trainer: Any) -> None:
        self.digest = ""
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.digest = self.digest or self._trainer.rollout_client.stats().weight_digest


def take_gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    """Stand in for accelerate's choice of a backend, which knows none for DeepSpeed on a machine without a GPU."""
    return "gloo", DistributedType.MULTI_CPU


def main() -> None:
    PartialState._prepare_backend = take_gloo
    model, folder, lora = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "lora"
    args = config(folder, deepspeed=ZERO3, use_cpu=False, max_steps=3, learning_rate=1e-2, rollout_server_timeout=60.0)
    peft = LoraConfig(target_modules=["q_proj", "down_proj"], r=2) if lora else None
    built = trainer(model, args, GRPOTrainer, peft_config=peft)
    first = FirstDigest(built)
    built.add_callback(first)
    built.train()
    assert not any(parameter.numel() for parameter in built.model.parameters()), "each rank holds a part of each"
    built.force_sync()
    served, trained = built.rollout_client.stats().weight_digest, digest_of_state(whole(built.model, lora=lora))
    facts = f"moved={first.digest != served} serves it={served == trained} gap {built.rollout_logprob_gap.max:.0e}"
    sys.stdout.write(f"rank {built.accelerator.process_index} {facts}\n")  # one write: lines of two ranks do not mix


if __name__ == "__main__":
    main()
