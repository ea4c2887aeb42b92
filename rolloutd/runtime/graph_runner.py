"""Batch -> Handle on a GPU: runs of decode steps by the host-free loop, as CUDA graphs; all else eagerly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rolloutd.config import SharedPrefixAttention
from rolloutd.engine.sequence import Batch, Handle
from rolloutd.kernels.head_and_draw import MAX_ROWS
from rolloutd.models.model import Model, W
from rolloutd.weights.in_place import overwrite
from rolloutd.weights.packing import DecoderWeights, Precision

from .decode_loop import DecodeLoop
from .inputs import ForwardInputs
from .loop_rows import LoopSizes
from .model_runner import ModelRunner
from .shared_prefix import SharedPrefixes, SharingRule
from .step_graphs import Capture, StepGraphs
from .transfers import transfers_for

MAX_STEPS = 8
"""Steps of a run: the host's work on an answer is hidden behind the next one, and 1.5 runs of each sequence are lost
after its end."""


FusedDraw = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""`head_and_draw` of kernels/head_and_draw.py, or its reference."""


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
        capture: Capture | None,
        fused_draw: FusedDraw | None = None,
        shared_prefix_attention: SharedPrefixAttention = "off",
    ) -> None:
        """Return a runner whose steps are captured by `capture`; None computes them one kernel at a time.

        `fused_draw` computes head and draw of few rows at once.
        """
        self._graphs = StepGraphs(capture)
        self._fused_draw = fused_draw
        self._sharing = shared_prefix_attention
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
        rule = SharingRule.of(self._sharing, block_size)
        kv_bytes = num_bytes // (len(self._model.kv_layers) * (num_blocks + 1) * block_size)
        prefixes = None if rule is None else SharedPrefixes(rule, self._max_num_seqs, block_size, kv_bytes)
        transfers = transfers_for(self._device)
        self._loop = DecodeLoop(self._decode, self._draw_next, sizes, self._device, transfers, self._graphs, prefixes)
        return num_bytes

    def free_cache(self) -> None:
        """Drop the KV cache and the graphs that read it."""
        self._graphs.forget()
        self._loop = None
        super().free_cache()

    def _compute(self, batch: Batch) -> Handle:
        """Start a run of several steps and return at once, or compute a single step."""
        if batch.num_steps == 1:
            return super()._compute(batch)
        assert self._loop is not None, "the KV cache is asleep"
        return self._loop.launch(batch)

    def _decode(self, inputs: ForwardInputs) -> Tensor:
        assert self._cache is not None
        return self._model.forward(self.weights, inputs, self._cache)

    def _draw_next(self, hidden_RE: Tensor, *keys: Tensor, **cuts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what rows of the hidden state draw; `keys` and `cuts` are those of `draw_tokens`."""
        head = self._model.head(self.weights)
        fused = self._fused_draw
        # fp32 has no tensor cores at full precision: there a library's product is far ahead of ours.
        if fused is None or head is None or cuts or hidden_RE.shape[0] > MAX_ROWS or head.weight_VE.dtype.itemsize > 2:
            return self._draw(self._model.logits(self.weights, hidden_RE), *keys, **cuts)
        weight_VE, divisor, softcap = head.weight_VE, head.divisor, head.softcap
        return fused(hidden_RE, weight_VE, *keys, logits_divisor=divisor, logits_softcap=softcap)

    def _forget(self) -> None:
        self._graphs.forget()

    def _placed(self, weights: W) -> W:
        """Return the old weights with the new numbers, where graphs can go on reading them; else new ones, no graphs.

        The copy comes after the runs that are launched, and before those to come.
        """
        serving = self._weights
        if isinstance(serving, DecoderWeights) and isinstance(weights, DecoderWeights) and overwrite(serving, weights):
            return serving
        self._graphs.forget()
        return weights
