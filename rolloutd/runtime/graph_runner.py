"""Batch -> Handle on a GPU: runs of decode steps by the host-free loop, as CUDA graphs; all else eagerly."""

from __future__ import annotations

import torch
from torch import Tensor

from rolloutd.engine.sequence import Batch, Handle
from rolloutd.models.model import Model, W
from rolloutd.weights.in_place import overwrite
from rolloutd.weights.packing import DecoderWeights, Precision

from .decode_loop import DecodeLoop, DrawTokens
from .inputs import ForwardInputs
from .loop_rows import LoopSizes
from .model_runner import ModelRunner
from .step_graphs import Capture, StepGraphs
from .transfers import transfers_for

MAX_STEPS = 8
"""Steps of a run: the host's work on an answer is hidden behind the next one, and 1.5 runs of each sequence are lost
after its end."""


class GraphRunner(ModelRunner[W]):
    """A `ModelRunner` that need not come back to the host after each step."""

    max_steps = MAX_STEPS

    def __init__(
        self,
        model: Model[W],
        weights: W,
        precision: Precision,
        device: torch.device,
        *,
        max_num_seqs: int,
        max_model_len: int,
        draw: DrawTokens,
        capture: Capture | None,
    ) -> None:
        """Return a runner whose steps are captured by `capture`; None computes them one kernel at a time."""
        self._graphs = StepGraphs(capture)
        self._draw = draw
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._loop: DecodeLoop | None = None
        super().__init__(model, weights, precision, device)

    def allocate_cache(self, num_blocks: int, block_size: int) -> int:
        """Create the KV cache, with one more block for what nobody reads, and return its bytes."""
        num_bytes = super().allocate_cache(num_blocks + 1, block_size)
        self._graphs.forget()
        sizes = LoopSizes(
            max_num_seqs=self._max_num_seqs,
            max_model_len=self._max_model_len,
            max_steps=self.max_steps,
            block_size=block_size,
            scratch_block=num_blocks,
            vocab_size=self._model.vocab_size,
        )
        transfers = transfers_for(self._device)
        self._loop = DecodeLoop(self._decode, self._draw, sizes, self._device, transfers, self._graphs)
        return num_bytes

    def free_cache(self) -> None:
        """Drop the KV cache and the graphs that read it."""
        self._graphs.forget()
        self._loop = None
        super().free_cache()

    def run(self, batch: Batch) -> Handle:
        """Start a run of several steps and return at once, or compute a single step."""
        if batch.num_steps == 1:
            return super().run(batch)
        assert self._loop is not None, "the KV cache is asleep"
        return self._loop.launch(batch)

    def _decode(self, inputs: ForwardInputs) -> Tensor:
        assert self._cache is not None
        return self._model.logits(self.weights, self._model.forward(self.weights, inputs, self._cache))

    def _placed(self, weights: W) -> W:
        """Return the old weights with the new numbers, where graphs can go on reading them; else new ones, no graphs.

        The copy comes after the runs that are launched, and before those to come.
        """
        serving = self._weights
        if isinstance(serving, DecoderWeights) and isinstance(weights, DecoderWeights) and overwrite(serving, weights):
            return serving
        self._graphs.forget()
        return weights
