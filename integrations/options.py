"""The adapter's config fields, who wins when they are given twice, and what cannot go together."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

from rolloutd.errors import ConfigError, check_choice

log = logging.getLogger(__name__)

NumericsChoice = Literal["auto", "fp32", "bf16", "autocast"]
LoraMode = Literal["exact", "merged"]


@dataclass
class RolloutServerFields:
    """Fields that our trainer configs have besides TRL's; each is a command-line flag under `TrlParser`."""

    use_rollout_server: bool = field(
        default=False, metadata={"help": "Generate with a rolloutd daemon instead of the training model."}
    )
    rollout_server_address: str | None = field(
        default=None,
        metadata={"help": "Endpoint or connection file of a running daemon. None: rank 0 starts one and reaps it."},
    )
    rollout_server_token: str | None = field(
        default=None, metadata={"help": "Secret of the daemon, where it asks for one. Masked in logs."}
    )
    rollout_server_timeout: float = field(
        default=60.0,
        metadata={
            "help": "Seconds without any sign of life from the daemon before a named error. It does not limit how "
            "long a generation takes."
        },
    )
    rollout_server_numerics: str = field(
        default="auto",
        metadata={"help": "Rounding of the daemon: auto (mirrors the trainer), autocast, bf16 or fp32."},
    )
    rollout_server_lora: str = field(
        default="exact",
        metadata={"help": "exact: adapter beside the matrices, PEFT's rounding. merged: added into copies of them."},
    )
    rollout_server_delta: bool = field(
        default=False,
        metadata={
            "help": "Send only what changed of full weights, where that is less: for a daemon behind a slow link. Rank "
            "0 keeps a copy of what it sent."
        },
    )
    rollout_server_share_base: bool = field(
        default=False,
        metadata={
            "help": "LoRA, with trainer and daemon on one GPU: the base exists once, in the trainer's memory, and the "
            "daemon reads it there."
        },
    )
    rollout_server_max_logprob_gap: float | None = field(
        default=None,
        metadata={
            "help": "Stop with PARITY_MISMATCH where the mean of |trainer's - daemon's log-probability| of a batch is "
            "above this, in nats. None: it is only logged."
        },
    )
    rollout_server_gpu_memory_utilization: float | None = field(
        default=None,
        metadata={"help": "Fraction of the GPU for a daemon that the trainer starts. None: 0.3."},
    )
    rollout_server_max_model_len: int | None = field(
        default=None,
        metadata={"help": "Longest prompt plus completion of a daemon that the trainer starts. None: the model's."},
    )


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """The fields above, checked."""

    address: str | None = None
    token: str | None = field(default=None, repr=False)
    timeout_s: float = 60.0
    numerics: NumericsChoice = "auto"
    lora_mode: LoraMode = "exact"
    delta: bool = False
    share_base: bool = False
    max_logprob_gap: float | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None

    @classmethod
    def from_args(cls, args: Any) -> RolloutOptions:
        """Read the fields of a trainer config; TRL's own config, which lacks them, gives the defaults."""
        values: dict[str, Any] = {
            item.name: getattr(args, item.name, item.default) for item in fields(RolloutServerFields)
        }
        timeout_s = values["rollout_server_timeout"]
        if not isinstance(timeout_s, (int, float)) or not 0.1 <= timeout_s <= 86400:
            raise ConfigError(f"rollout_server_timeout={timeout_s!r} is not a number of seconds, 0.1 to 86400.")
        check_choice("rollout_server_numerics", values["rollout_server_numerics"], get_args(NumericsChoice))
        check_choice("rollout_server_lora", values["rollout_server_lora"], get_args(LoraMode))
        return cls(
            address=values["rollout_server_address"],
            token=values["rollout_server_token"],
            timeout_s=float(timeout_s),
            numerics=cast(NumericsChoice, values["rollout_server_numerics"]),
            lora_mode=cast(LoraMode, values["rollout_server_lora"]),
            delta=bool(values["rollout_server_delta"]),
            share_base=bool(values["rollout_server_share_base"]),
            max_logprob_gap=_max_gap(values["rollout_server_max_logprob_gap"], args),
            gpu_memory_utilization=values["rollout_server_gpu_memory_utilization"],
            max_model_len=values["rollout_server_max_model_len"],
        )


def _max_gap(value: Any, args: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 0.0 <= value < float("inf"):
        raise ConfigError(f"rollout_server_max_logprob_gap={value!r} is not a number of nats, 0 or more, nor None.")
    if not getattr(args, "vllm_importance_sampling_correction", True):
        raise ConfigError(
            f"rollout_server_max_logprob_gap={value:g} needs vllm_importance_sampling_correction=True: without it the "
            "trainer does not compare log-probabilities. Turn it on, or leave the limit out."
        )
    return float(value)


def warn_about_address(options: RolloutOptions) -> None:
    """Warn of fields that only a daemon of the trainer's own would follow."""
    if options.address is not None and (options.gpu_memory_utilization or options.max_model_len):
        log.warning(
            "rollout_server_gpu_memory_utilization and rollout_server_max_model_len have no effect on the daemon at "
            "rollout_server_address; set them where it is started"
        )


def is_enabled(keyword: bool | None, args: Any) -> bool:
    """Return whether the daemon is used: the trainer's keyword wins over the config field, and the default is no."""
    if keyword is not None:
        return keyword
    return bool(getattr(args, "use_rollout_server", False))


def warn_about_unused(args: Any) -> None:
    """Warn of fields that were set although no daemon is used."""
    unused = [
        item.name
        for item in fields(RolloutServerFields)
        if item.name != "use_rollout_server" and getattr(args, item.name, item.default) != item.default
    ]
    if unused:
        log.warning("%s without use_rollout_server=True: no daemon is used, they have no effect", ", ".join(unused))


def check_args(args: Any, trainer_name: str) -> None:
    """Raise `ConfigError` for settings of the trainer that contradict a rollout server."""
    if getattr(args, "use_vllm", False):
        raise ConfigError(
            f"{trainer_name} got both use_vllm=True and use_rollout_server=True; each replaces generation. Drop one."
        )
    if getattr(args, "use_transformers_continuous_batching", False):
        raise ConfigError(
            f"{trainer_name} got both use_transformers_continuous_batching=True and use_rollout_server=True; each "
            "replaces generation. Drop one."
        )
    if getattr(args, "vllm_structured_outputs_regex", None):
        raise ConfigError(
            "vllm_structured_outputs_regex is not supported with use_rollout_server=True: completions would not be "
            "constrained. Leave it out."
        )
    corrects = getattr(args, "vllm_importance_sampling_correction", True)
    mode = getattr(args, "vllm_importance_sampling_mode", "token_mask")
    if getattr(args, "loss_type", None) == "vespo" and corrects and mode not in ("token_truncate", "token_mask"):
        raise ConfigError(
            f"loss_type='vespo' needs vllm_importance_sampling_mode='token_truncate' or 'token_mask', not {mode!r}."
        )
    temperature = getattr(args, "temperature", 1.0)
    if not temperature > 0:
        raise ConfigError(
            f"temperature={temperature}: the trainer divides logits by it. Use a value above 0, such as 1.0."
        )
