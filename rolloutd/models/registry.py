"""From a checkpoint to a `Model` and its weights: which architectures are native, and how the others run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from rolloutd.config import EngineConfig
from rolloutd.errors import ConfigError
from rolloutd.kernels.launch import HAS_TRITON
from rolloutd.runtime.cpu_kernels import cpu_kernels
from rolloutd.runtime.cpu_ops import CpuOps, RowInvariantCpuOps, packed_products
from rolloutd.runtime.ops import Ops
from rolloutd.runtime.row_invariant import RowInvariantOps
from rolloutd.runtime.triton_ops import TritonOps
from rolloutd.weights.loader import Checkpoint
from rolloutd.weights.packing import Precision

from .config import SUPPORTED_ARCHITECTURES, check_architecture, decoder_config
from .model import Model, pack
from .native import NativeModel

log = logging.getLogger(__name__)

NATIVE_ARCHITECTURES = SUPPORTED_ARCHITECTURES
"""What has a decoder of ours; every other causal LM falls back on transformers' own code."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, whose code it is, the weights of its checkpoint, and the context length that it is built for."""

    model_impl: str
    model: Model[Any]
    weights: Any
    max_model_len: int


def load_model(
    config: EngineConfig, checkpoint: Checkpoint, hf_config: Any, precision: Precision, device: torch.device
) -> LoadedModel:
    """Return what serves a checkpoint; `ModelUnsupported` where `model_impl` leaves nothing that does."""
    architecture = check_architecture(checkpoint.architectures(), config.model, config.model_impl)
    if config.model_impl != "transformers" and architecture in NATIVE_ARCHITECTURES:
        return _load_native(config, architecture, checkpoint, hf_config, precision, device)
    return _load_fallback(config, architecture, checkpoint, hf_config, precision, device)


def _load_native(
    config: EngineConfig,
    architecture: str,
    checkpoint: Checkpoint,
    hf_config: Any,
    precision: Precision,
    device: torch.device,
) -> LoadedModel:
    decoder = decoder_config(architecture, hf_config)
    max_model_len = resolve_max_model_len(config, decoder.max_position_embeddings)
    ops = _ops_for(config, precision, device)
    max_lora_rank = config.max_lora_rank if ops.appends_adapters else 0
    model = NativeModel(decoder, precision, ops, max_model_len, device, max_lora_rank)
    return LoadedModel("native", model, pack(model, checkpoint.tensors(precision.residual)), max_model_len)


def _load_fallback(
    config: EngineConfig,
    architecture: str,
    checkpoint: Checkpoint,
    hf_config: Any,
    precision: Precision,
    device: torch.device,
) -> LoadedModel:
    if config.deterministic:
        raise ConfigError(
            f"deterministic=True with {architecture}, which runs by transformers' own code: its products depend on the "
            "batch. Leave it out, or use a native architecture."
        )
    # Here and not above: transformers' modelling code takes seconds to import, and native models do without.
    from .transformers_loading import causal_lm_class, load_transformers_model, num_positions

    cls = causal_lm_class(architecture, hf_config)
    log.info("architecture=%s model_impl=transformers", architecture)
    max_model_len = resolve_max_model_len(config, num_positions(hf_config, config.max_model_len))
    model, weights = load_transformers_model(cls, hf_config, checkpoint.path, precision, max_model_len, device)
    return LoadedModel("transformers", model, weights, max_model_len)


def _ops_for(config: EngineConfig, precision: Precision, device: torch.device) -> Ops:
    """Return the kind of ops that a native model computes with."""
    exact = precision.matrix == precision.residual == precision.head == torch.float32
    if device.type == "cpu" and exact:  # in bf16 and autocast every last bit before a rounding counts: as torch has it
        kind = RowInvariantCpuOps if config.deterministic else CpuOps
        kernels = cpu_kernels()
        return kind(kernels, packed_products(kernels))
    if config.deterministic:
        return RowInvariantOps()
    if device.type == "cuda":
        if HAS_TRITON:
            return TritonOps()
        log.warning("triton is not installed: the GPU computes by PyTorch's own operators, which is slower")
    return Ops()


def resolve_max_model_len(config: EngineConfig, positions: int) -> int:
    """Return the context length; `ConfigError` where more is asked for than the model has positions."""
    if config.max_model_len is None:
        return positions
    if config.max_model_len > positions:
        raise ConfigError(
            f"max_model_len={config.max_model_len} > {positions}, the model's positions. "
            f"Use --max-model-len {positions} or less."
        )
    return config.max_model_len
