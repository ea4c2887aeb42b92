"""What TRL must offer for the adapter to work, checked at attach so that a moved seam is one clear error."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import trl
from torch import nn

from rolloutd.config import HeadDtype
from rolloutd.errors import ConfigError
from rolloutd.outputs import ModelInfo
from rolloutd.weights import device_memory

from .options import NumericsChoice, RolloutOptions
from .trainer_weights import Adapter, base_model_of, is_dequantized, is_quantized, sharding_of

log = logging.getLogger(__name__)

_GENERATE_PARAMETERS = {"self", "prompts", "images", "num_generations", "profiler"}
_TURN_NAMES = ("use_vllm", "vllm_generation.sync_weights", "vllm_generation.generate", "_last_loaded_step")
_ATTRIBUTES = ("accelerator", "args", "model", "state", "use_vllm", "processing_class", "temperature", "_metrics")


def check_class(trainer_class: type, backend_generate: Callable[..., Any] | None = None) -> None:
    """Raise `ConfigError` unless the trainer class calls a backend as we answer; names TRL's version and what moved."""
    moved = []
    turn = getattr(trainer_class, "_generate_single_turn", None)
    if turn is None:
        moved.append(f"{trainer_class.__name__} has no _generate_single_turn")
    else:
        source = inspect.getsource(turn)
        moved += [f"_generate_single_turn does not mention {name}" for name in _TURN_NAMES if name not in source]
    generate = backend_generate or _vllm_generate()
    if generate is None:
        moved.append("trl.generation.vllm_generation.VLLMGeneration.generate is gone")
    else:
        unknown = set(inspect.signature(generate).parameters) - _GENERATE_PARAMETERS
        moved += [f"VLLMGeneration.generate has a new parameter {name}" for name in sorted(unknown)]
    _raise(moved)


def check_instance(trainer: Any) -> None:
    """Raise `ConfigError` unless an initialised trainer has what the backend reads."""
    _raise([f"{type(trainer).__name__} has no attribute {name}" for name in _ATTRIBUTES if not hasattr(trainer, name)])


def check_shares_base(trainer: Any, adapter: Adapter | None) -> None:
    """Raise `ConfigError` where `rollout_server_share_base` cannot be: the base must be frozen, whole, and on a GPU."""
    sharding, device = sharding_of(trainer.accelerator), trainer.accelerator.device
    obstacle = None
    if not device_memory.is_shareable(device):
        obstacle = f"the model is on {device}: only a GPU's memory is shared"
    elif adapter is None:
        obstacle = "this trainer has no LoRA adapter: it trains the base"
    elif sharding != "none":
        obstacle = f"the base is split over the ranks ({sharding})"
    elif is_quantized(trainer.model):
        obstacle = "the base is quantized, and the daemon computes with other numbers"
    if obstacle is not None:
        raise ConfigError(f"rollout_server_share_base=True, and {obstacle}. Leave it out.")


def _vllm_generate() -> Callable[..., Any] | None:
    try:
        from trl.generation.vllm_generation import VLLMGeneration
    except ImportError:
        return None
    return getattr(VLLMGeneration, "generate", None)


def _raise(moved: list[str]) -> None:
    if moved:
        raise ConfigError(
            f"trl {trl.__version__} changed where the rollout server plugs in: {'; '.join(moved)}. Use a version of "
            "rolloutd made for it, or a TRL version that its documentation lists."
        )


def eos_token_ids(trainer: Any) -> list[int]:
    """Return the ids that the trainer takes for the end of a completion."""
    ids = getattr(trainer, "eos_token_ids", None)
    if ids is None:  # TRL up to 1.9 knows the tokenizer's alone
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        ids = [tokenizer.eos_token_id]
    return [int(token) for token in ids if token is not None]


# -------------------------------------------------------------------- numerics


def matrix_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the base model's matrices; bfloat16 for a quantized base.

    Embedding and head do not count: `cast_lm_head_to_fp32` turns both to fp32 where they are tied.
    """
    if is_quantized(model):
        return torch.bfloat16
    base = base_model_of(model)
    inner = (
        parameter.dtype
        for name, parameter in base.named_parameters()
        if ".lora_" not in name and parameter.ndim >= 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight"))
    )
    return next(inner, torch.float32)


def trainer_numerics(trainer: Any) -> str:
    """Return where the trainer rounds: fp32, bf16, fp16, or autocast."""
    dtype = matrix_dtype(trainer.model)
    if dtype != torch.float32:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
    if trainer.accelerator.mixed_precision == "bf16":
        return "autocast"
    return "fp16-autocast" if trainer.accelerator.mixed_precision == "fp16" else "fp32"


def daemon_numerics(trainer: Any, options: RolloutOptions) -> NumericsChoice:
    """Return the numerics to start a daemon with: what was asked for, else the trainer's, else fp32.

    On a CPU `auto` is fp32: bf16 products are slow there.
    """
    if options.numerics != "auto":
        return options.numerics
    if trainer.accelerator.device.type == "cpu":
        return "fp32"
    match trainer_numerics(trainer):
        case "bf16":
            return "bf16"
        case "autocast":
            return "autocast"
        case _:
            return "fp32"


def head_dtype(trainer: Any) -> HeadDtype:
    """Return the head to start a daemon with: fp32 where the trainer casts its own, else as the numerics say."""
    return "float32" if getattr(trainer.args, "cast_lm_head_to_fp32", False) else "auto"


# ------------------------------------------------------------- trainer, daemon


def check_daemon(trainer: Any, info: ModelInfo) -> None:
    """Raise `ConfigError` where the daemon serves another model than the one in training."""
    base = base_model_of(trainer.model)
    config = base.config.get_text_config()
    if info.architecture != type(base).__name__:
        raise ConfigError(f"the daemon serves a {info.architecture}, the trainer trains a {type(base).__name__}.")
    if info.vocab_size != config.vocab_size:
        raise ConfigError(
            f"the daemon's vocabulary has {info.vocab_size} entries, the trainer's {config.vocab_size}. Serve the "
            "model that is trained."
        )


def differences(trainer: Any, info: ModelInfo, adapter: Adapter | None) -> list[str]:
    """Return what differs between trainer and daemon in a way that shows in log-probabilities or lengths."""
    found = []
    wanted = trainer_numerics(trainer)
    if info.numerics != wanted:
        found.append(
            f"the trainer computes in {wanted}, the daemon in {info.numerics}; log-probabilities differ by that "
            "rounding. Set rollout_server_numerics (or bf16 of the config) so that they agree"
        )
    trainer_casts = head_dtype(trainer) == "float32"
    if trainer_casts and info.head_dtype != "float32":
        found.append(
            f"cast_lm_head_to_fp32=True: the trainer's head is fp32, the daemon's is {info.head_dtype}. Start it with "
            "--head-dtype float32"
        )
    if not trainer_casts and wanted in ("bf16", "autocast") and info.head_dtype == "float32" != info.dtype:
        found.append("the daemon's head is fp32, the trainer's is not. Set cast_lm_head_to_fp32=True")
    positions = base_model_of(trainer.model).config.get_text_config().max_position_embeddings
    if getattr(trainer, "tools", None) and info.max_model_len < positions:
        found.append(
            f"TRL drops tool calls beyond {positions} positions, the daemon's context ends at {info.max_model_len}: "
            "longer conversations fail. Raise rollout_server_max_model_len"
        )
    if is_quantized(trainer.model) and not is_dequantized(trainer.model, trainer.accelerator):
        found.append("the trainer's base is quantized, the daemon's is not: their numbers cannot agree")
    dropout = float((adapter.peft_config.get("lora_dropout") if adapter else 0.0) or 0.0)
    if dropout and not getattr(trainer.args, "disable_dropout", False):
        found.append(f"lora_dropout={dropout}: the trainer's own log-probabilities are noisy. Set disable_dropout=True")
    return found
