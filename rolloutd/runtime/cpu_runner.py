"""Batch -> Handle on a CPU: steps that only decode by one call of C, all others call by call."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from rolloutd.models.model import Model, W
from rolloutd.weights.packing import Precision

from .cpu_kernels import CpuKernels
from .cpu_ops import MLP_ROWS
from .cpu_step import NotRecordable, RecordedStep, record
from .inputs import ROW_MULTIPLE, ForwardInputs
from .model_runner import ModelRunner

log = logging.getLogger(__name__)


class CpuRunner(ModelRunner[W]):
    """A `ModelRunner` whose steps are recorded, anew for each version of the weights; what is computed is the same."""

    def __init__(
        self,
        model: Model[W],
        weights: W,
        precision: Precision,
        device: torch.device,
        *,
        kernels: CpuKernels,
        max_num_seqs: int,
    ) -> None:
        super().__init__(model, weights, precision, device)
        self._kernels = kernels
        self._num_rows = min(-(-max_num_seqs // ROW_MULTIPLE) * ROW_MULTIPLE, MLP_ROWS)
        self._step: RecordedStep | None = None
        self._is_tried = False
        """Whether these weights' step was recorded, or cannot be."""

    @property
    def recorded(self) -> RecordedStep | None:
        """The step as it was recorded; None before it was needed, and where it cannot be."""
        return self._step

    def allocate_cache(self, num_blocks: int, block_size: int) -> int:
        """Create the KV cache and return its bytes."""
        self._forget()
        return super().allocate_cache(num_blocks, block_size)

    def free_cache(self) -> None:
        """Drop the KV cache and the step that reads it."""
        self._forget()
        super().free_cache()

    def _placed(self, weights: W) -> W:
        self._forget()
        return weights

    def _forget(self) -> None:
        self._step, self._is_tried = None, False

    def _forward(self, inputs: ForwardInputs) -> Tensor:
        if inputs.prefills or len(inputs.token_ids_T) > self._num_rows:
            return super()._forward(inputs)
        if not self._is_tried:
            self._is_tried = True
            try:
                self._step = record(self._kernels, super()._forward, self._num_rows)
            except NotRecordable as reason:
                log.info("decoding call by call reason=%r", str(reason))
        return super()._forward(inputs) if self._step is None else self._step.run(inputs)
