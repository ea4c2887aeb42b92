"""Which runner a device gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rolloutd.config import EngineConfig
from rolloutd.kernels.head_and_draw import head_and_draw
from rolloutd.kernels.launch import HAS_TRITON
from rolloutd.models.model import Model
from rolloutd.weights.packing import Precision

from .cpu_kernels import cpu_kernels
from .cpu_runner import CpuRunner
from .graph_runner import GraphRunner
from .model_runner import ModelRunner
from .step_graphs import Capture, CudaCapture


def runner_for(
    config: EngineConfig,
    model: Model[Any],
    weights: Any,
    precision: Precision,
    device: torch.device,
    max_model_len: int,
    capture_on: Callable[[torch.device], Capture] = CudaCapture,
) -> ModelRunner[Any]:
    """Return what computes on a device: on a GPU several steps without the host, on a CPU each step as one call.

    That takes fp32 and a C compiler; without them, and on a GPU without triton, by whose kernels the loop begins and
    ends its steps, the host calls one operator after the other.
    """
    is_recorded = device.type == "cpu" and precision.matrix == torch.float32 and not config.enforce_eager
    if is_recorded and (kernels := cpu_kernels()) is not None:
        return CpuRunner(model, weights, precision, device, kernels=kernels, max_num_seqs=config.max_num_seqs)
    if device.type != "cuda" or not HAS_TRITON:
        return ModelRunner(model, weights, precision, device)
    return GraphRunner(
        model,
        weights,
        precision,
        device,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        capture=None if config.enforce_eager else capture_on(device),
        fused_draw=None if config.deterministic else head_and_draw,
        shared_prefix_attention="off" if config.deterministic else config.shared_prefix_attention,
    )
