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
        self._answer: tuple[Tensor, ...] = ()
        """Of the last recorded step: the hidden state, and logits if they were recorded too."""

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
        self._step, self._is_tried, self._answer = None, False, ()

    def _forward(self, inputs: ForwardInputs) -> Tensor:
        if inputs.prefills or len(inputs.token_ids_T) > self._num_rows:
            return super()._forward(inputs)
        if not self._is_tried:
            self._is_tried = True  # also where an error ends this step: the next one goes call by call
            self._step = self._record()
        if self._step is None:
            return super()._forward(inputs)
        self._answer = self._step.run(inputs)
        return self._answer[0]

    def _logits(self, hidden_LE: Tensor) -> Tensor:
        """Return logits of a few rows: those of the recorded step, where its first rows are asked for."""
        if len(self._answer) < 2 or hidden_LE.data_ptr() != self._answer[0].data_ptr():
            return super()._logits(hidden_LE)
        return self._answer[1][: len(hidden_LE)]

    def _record(self) -> RecordedStep | None:
        """Return the step with its logits, or without them; None, with the reason in the log, where it cannot be."""
        forward, reason = super()._forward, ""

        def with_logits(inputs: ForwardInputs) -> tuple[Tensor, ...]:
            hidden_TE = forward(inputs)
            return hidden_TE, self._model.logits(self.weights, hidden_TE)

        def without(inputs: ForwardInputs) -> tuple[Tensor, ...]:
            return (forward(inputs),)

        for step in (with_logits, without):
            try:
                return record(self._kernels, step, self._num_rows)
            except NotRecordable as error:
                reason = str(error)
        log.info("decoding call by call reason=%r", reason)
        return None
