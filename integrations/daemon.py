"""A daemon of the trainer's own: which model it loads, with which options, and how it ends."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rolloutd.errors import ConfigError, RolloutdError
from rolloutd.weights.loader import Checkpoint, resolve

from .contract import daemon_numerics, head_dtype
from .options import RolloutOptions
from .ranks import Ranks
from .trainer_weights import base_model_of, largest_rank, save_base

log = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
"""Longest start of a daemon, loading included. A daemon that dies meanwhile is noticed at once."""
MAX_DEFAULT_MODEL_LEN = 32768
"""Contexts of 128k and more are common and rarely used in full; one sequence of that length would set the KV pool."""
DEFAULT_GPU_MEMORY_UTILIZATION = 0.3
"""The trainer shares the GPU; TRL's own default for a colocated engine."""
STOP_GRACE_S = 2.0
MAX_APPENDED_RANK = 128
"""Larger adapters are computed in products of their own, which then cost little beside their bytes."""

# Fields of a config that change neither shapes nor numbers of the forward pass.
_INERT = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class Daemon(Protocol):
    """A running daemon process."""

    @property
    def address(self) -> str: ...

    @property
    def pid(self) -> int: ...

    def stop(self, grace_s: float) -> Any: ...


Starter = Callable[[Mapping[str, Any], Mapping[str, Any], float], Daemon]


@dataclass(frozen=True)
class Endpoint:
    """Where the daemon answers, and what rank 0 holds of one that it started."""

    address: str
    process: Daemon | None = None
    copy: Path | None = None
    """The temporary copy of the trainer's model that it serves, where one had to be made; on every rank."""

    def drop_copy(self) -> None:
        """Delete the copy once the daemon has loaded it: a run that is killed later leaves no gigabytes behind."""
        if self.copy is not None and self.process is not None:
            shutil.rmtree(self.copy, ignore_errors=True)


def start(trainer: Any, options: RolloutOptions, ranks: Ranks, starter: Starter) -> Endpoint:
    """Start a daemon on rank 0 and return where it answers on every rank, or raise its error on every rank.

    The daemon goes with the trainer or the process.
    """
    _check_one_node(ranks)
    model, is_copy = model_folder(trainer, ranks)
    daemon, error = None, None
    if ranks.is_main:
        try:
            daemon = starter(engine_options(trainer, options, model), {"die_with_parent": True}, START_TIMEOUT_S)
            weakref.finalize(trainer, daemon.stop, STOP_GRACE_S)
        except Exception as caught:  # told to all ranks, raised by `agree`
            error = caught
    address = ranks.agree(error, {"address": daemon.address if daemon is not None else ""})[0]["address"]
    return Endpoint(address, daemon, Path(model) if is_copy else None)


def _check_one_node(ranks: Ranks) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    if local < ranks.world_size:
        raise ConfigError(
            f"{ranks.world_size} ranks, {local} of them on this node: a daemon that rank 0 starts is reached from its "
            "own node only. Start one with `rolloutd --listen tcp://HOST:PORT` and set rollout_server_address."
        )


def engine_options(trainer: Any, options: RolloutOptions, model: str) -> dict[str, Any]:
    """Return `EngineConfig` fields for a daemon that shares the trainer's machine."""
    device = "cpu" if trainer.accelerator.device.type == "cpu" else "cuda"
    result: dict[str, Any] = {
        "model": model,
        "device": device,
        "numerics": daemon_numerics(trainer, options),
        "head_dtype": head_dtype(trainer),
        "max_model_len": options.max_model_len or default_max_model_len(trainer),
        "seed": int(trainer.args.seed),
    }
    if device == "cuda":
        result["gpu_memory_utilization"] = options.gpu_memory_utilization or DEFAULT_GPU_MEMORY_UTILIZATION
        if options.lora_mode == "exact":
            result["max_lora_rank"] = min(largest_rank(trainer.model), MAX_APPENDED_RANK)
    return result


def default_max_model_len(trainer: Any) -> int:
    """Return the model's positions, capped at 32768, or at twice the completions where those are longer."""
    positions = int(base_model_of(trainer.model).config.get_text_config().max_position_embeddings)
    return min(positions, max(MAX_DEFAULT_MODEL_LEN, 2 * int(trainer.max_completion_length)))


def model_folder(trainer: Any, ranks: Ranks) -> tuple[str, bool]:
    """Return a folder with the trainer's model, and whether it is a temporary copy, not where it was loaded from.

    A collective.
    """
    found, error = None, None
    if ranks.is_main:
        try:
            found = loaded_from(trainer)
        except Exception as caught:  # told to all ranks, raised by `agree`
            error = caught
    found = ranks.agree(error, {"found": found})[0]["found"]
    if found is not None:
        return str(found), False
    folder, error = "", None
    try:
        if ranks.is_main:
            folder = tempfile.mkdtemp(prefix="rolloutd-model-")
            weakref.finalize(trainer, shutil.rmtree, folder, ignore_errors=True)
            log.info("the model was not loaded from a folder; serving a copy of it path=%s", folder)
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        save_base(trainer.model, trainer.accelerator, tokenizer, Path(folder))
    except Exception as caught:  # told to all ranks, raised by `agree`
        error = caught
    return str(ranks.agree(error, {"folder": folder})[0]["folder"]), True


def loaded_from(trainer: Any) -> str | None:
    """Return the folder that the trainer's model came from, None where its config or its format is another one."""
    config = base_model_of(trainer.model).config
    name = getattr(config, "_name_or_path", "") or ""
    if not name:
        return None
    try:
        path = resolve(name, getattr(config, "_commit_hash", None))
        stored = Checkpoint(path).hf_config().to_dict()
    except (RolloutdError, OSError, ValueError):
        return None
    if _meaning(stored) != _meaning(config.to_dict()) or not any(path.glob("*.safetensors")):
        return None
    return str(path)


def _meaning(config: Mapping[str, Any]) -> Any:
    kept = {name: value for name, value in config.items() if name not in _INERT}
    return json.loads(json.dumps(kept, sort_keys=True, default=str))
