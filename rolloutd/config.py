"""Options of the engine and of the daemon: one definition, from which keywords, flags, environment and YAML derive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import ConfigError, check_choice, did_you_mean

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Numerics = Literal["auto", "fp32", "bf16", "autocast"]
HeadDtype = Literal["auto", "float32"]
ModelImpl = Literal["auto", "native", "transformers"]
TrainerDtype = Literal["auto", "fp32", "bf16", "autocast"]
SharedPrefixAttention = Literal["auto", "on", "off"]
WeightStaging = Literal["device", "host", "none"]
LogLevel = Literal["debug", "info", "warning", "error"]

C = TypeVar("C", bound="_Config")


@dataclass(frozen=True, kw_only=True)
class _Config:
    """Values are checked against their annotations and ranges; an error names field, value and remedy."""

    _RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, hints[field.name])
            if field.name in self._RANGES and value is not None:
                low, high = self._RANGES[field.name]
                if not low <= value <= high:
                    raise ConfigError(f"{field.name}={value} is outside {low:g} to {high:g}.")

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Return a config from names and values; an unknown name is an error with the nearest known one."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` takes back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class EngineConfig(_Config):
    """Everything that decides what the engine computes. Each field is a keyword of `LLM` and a flag of `rolloutd`."""

    model: str
    """A local directory with config.json and safetensors, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model. A model directory without one serves token ids only."""
    device: Device = "auto"
    """`auto` takes the GPU where torch sees one."""
    dtype: Dtype = "auto"
    """Storage of the matrices. `auto`: the checkpoint's own on a GPU, float32 on a CPU."""
    numerics: Numerics = "auto"
    """Where values are rounded: `fp32`, `bf16`, or `autocast` (fp32 residual and norms, bf16 matrix products, as TRL's
    defaults compute). `auto` follows dtype."""
    head_dtype: HeadDtype = "auto"
    """Where logits are computed: `float32` is what TRL's `cast_lm_head_to_fp32` does; `auto` follows numerics."""
    model_impl: ModelImpl = "auto"
    """Whose code computes the decoder: ours (`native`), or transformers' over our KV cache (`transformers`), which
    every causal LM that goes through its attention interface can. `auto` takes ours where it exists."""
    max_model_len: int | None = None
    """Most tokens of prompt and completion together. None: the model's own limit."""
    block_size: int = 16
    """Tokens per KV block. Small blocks share more prefix; large blocks make shorter tables."""
    gpu_memory_utilization: float = 0.9
    """Fraction of the GPU's memory that weights, KV cache and workspace may take together."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache. None: what gpu_memory_utilization leaves on a GPU; on a CPU enough for max_num_seqs
    sequences of full length, at most a quarter of the free memory."""
    max_num_seqs: int = 256
    """Most sequences that run at once."""
    max_num_batched_tokens: int = 8192
    """Most tokens that one step computes; longer prompts are prefilled in chunks."""
    enable_prefix_caching: bool = True
    """Keep the KV of finished prompts for requests that begin with the same tokens, under the same weights."""
    enforce_eager: bool = False
    """Never capture CUDA graphs, nor record steps on a CPU: decode steps call one kernel at a time. Slower, and less
    memory."""
    shared_prefix_attention: SharedPrefixAttention = "auto"
    """Read the KV of a group's prompt once per step for all its samples, on a GPU. `auto` does so where the reads that
    it saves outweigh its cost, `on` wherever two samples share a block. Never with `deterministic`."""
    weight_staging: WeightStaging = "device"
    """Where a full update comes together: on the `device` beside what serves; in `host` memory, from where it is
    written over what serves in one go; or with `none` at once over what serves, where no memory allows a second copy:
    serving stops from the first byte to the commit, and after a failure until a full update succeeds."""
    max_lora_rank: int = 0
    """Largest rank of adapters that a GPU computes inside of the base's own products: rows are kept free for them below
    each matrix, 1 to 2 % of the weights for rank 16. Adapters of larger ranks, and all with 0, take two small products
    more for each matrix. The TRL adapter sets it to what is trained."""
    deterministic: bool = False
    """Bit-identical tokens and log-probabilities whatever else is in the batch: alone, after a preemption or a restart,
    with the prompt prefilled whole, in chunks or from the prefix cache. On one machine, with one number of threads."""
    seed: int = 0
    """Seeds requests that carry no seed of their own."""

    _RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        "max_model_len": (1, 1 << 24),
        "block_size": (1, 4096),
        "gpu_memory_utilization": (0.01, 1.0),
        "kv_cache_bytes": (1, 1 << 50),
        "max_num_seqs": (1, 65536),
        "max_num_batched_tokens": (1, 1 << 24),
        "max_lora_rank": (0, 1024),
        "seed": (-(1 << 63), (1 << 64) - 1),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ConfigError("model='' names nothing. Pass a directory or a hub id with --model.")


@dataclass(frozen=True, kw_only=True)
class ServerConfig(_Config):
    """Everything about sockets, clients and process life. Each field is a flag of `rolloutd`."""

    listen: str = "ipc"
    """`ipc` for a socket in an owner-only directory, or tcp://HOST:PORT (port 0 picks a free one)."""
    connection_file: str | None = None
    """Where to write address and keys for clients. None: a file in the run directory, named in the log."""
    allow_remote: bool = False
    """Allow --listen on an address that other hosts reach. Clients must then hold the connection file's keys."""
    max_clients: int = 256
    """Most clients connected at once."""
    max_queued_requests: int = 65536
    """Most requests that wait or run at once, over all clients."""
    max_message_bytes: int = 256 << 20
    """Largest message accepted; weights travel in frames below it."""
    lease_s: float = 30.0
    """A client unheard of for this long is gone: its requests are cancelled."""
    stall_s: float = 120.0
    """Seconds that one engine step may take before requests are failed as ENGINE_STALLED."""
    grace: float = 10.0
    """Seconds that running requests get to finish after SIGTERM."""
    log_level: LogLevel = "info"
    ready_fd: int | None = None
    """A file descriptor that gets one line, the connection file's path, once the address answers."""
    die_with_parent: bool = False
    """End when the process that started the daemon ends. The TRL adapter sets it."""

    _RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        "max_clients": (1, 1 << 20),
        "max_queued_requests": (1, 1 << 30),
        "max_message_bytes": (1 << 16, 1 << 40),
        "lease_s": (0.5, 86400.0),
        "stall_s": (0.5, 86400.0),
        "grace": (0.0, 86400.0),
        "ready_fd": (0, 1 << 20),
    }


@dataclass(frozen=True, kw_only=True)
class CheckConfig(_Config):
    """What `rolloutd check` samples, and the trainer that it compares with. Each field is a flag of it."""

    trainer_dtype: TrainerDtype = "auto"
    """The trainer's mode: `fp32`, `bf16` (a model loaded in bf16), or `autocast` (fp32 weights, bf16=True: TRL's
    default). `auto`: as the engine computes."""
    cast_lm_head_to_fp32: bool | None = None
    """Whether the trainer's head is fp32, TRL's option of that name. None: as head_dtype says."""
    prompts: str | None = None
    """A file of prompts, one a line: text, or .jsonl of {"prompt": text or token ids}. None: built-in texts, or random
    ids where the model has no tokenizer. A file shorter than num_prompts is gone through again."""
    num_prompts: int = 16
    """Completions to sample, one a prompt."""
    max_tokens: int = 64
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Of sampling, and of the trainer's softmax."""
    max_mean: float | None = None
    """Exit with 1 where the mean of |log p - trainer's log p| is above this, in nats."""

    _RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        "num_prompts": (1, 1 << 20),
        "max_tokens": (1, 1 << 24),
        "temperature": (1e-3, 1e3),
        "max_mean": (0.0, 1e3),
    }


def _check_type(name: str, value: Any, hint: Any) -> None:
    options = get_args(hint) if get_origin(hint) is not Literal else ()
    if get_origin(hint) is Literal:
        check_choice(name, value, get_args(hint))
        return
    allowed = options or (hint,)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if float in allowed and is_number and math.isfinite(value):
        return
    if isinstance(value, bool) and bool not in allowed:
        raise ConfigError(f"{name}={value!r} has the wrong type; expected {_type_name(allowed)}.")
    if not any(isinstance(value, kind) for kind in allowed if kind is not float):
        raise ConfigError(f"{name}={value!r} has the wrong type; expected {_type_name(allowed)}.")


def _type_name(allowed: tuple[Any, ...]) -> str:
    return " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
